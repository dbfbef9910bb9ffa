"""Makes `gradstats` and `gradstats.kernels` importable from this checkout, where not installed.

The Triton kernels live in kernels/ and are installed as `gradstats.kernels`; a checkout that was
only built in place (`python setup.py build_ext --inplace`) does not have them under that name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"


def _map_kernels() -> None:
    if importlib.util.find_spec("gradstats.kernels") is not None:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "gradstats.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


for _path in (str(BENCH), str(ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)
_map_kernels()
