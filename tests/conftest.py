"""Helpers beside the tests (`oracle`, `models`) are imported by name."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
# Test processes that run side by side share the cores; what needs threads sets their number itself.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# Elsewhere every run draws new examples; a change is judged by the same ones each time.
settings.register_profile("ci", derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
