"""Times of operations and of whole training steps on this machine, beside torch's own and other tools'."""

from __future__ import annotations

from gradstats.workbench.bench.compared import Change, compare_files
from gradstats.workbench.bench.own import StepBench, bench_step
from gradstats.workbench.bench.suite import Suite, bench

__all__ = ["Change", "StepBench", "Suite", "bench", "bench_step", "compare_files"]
