"""The fixture `gradstats_benchmark`, for benchmark suites of others; pytest finds it by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradstats.workbench.bench import StepBench


@pytest.fixture
def gradstats_benchmark(request: pytest.FixtureRequest) -> Callable[..., StepBench]:
    """What statistics cost in a training step: `gradstats.workbench.bench.bench_step`, with its arguments.

    ```python
    def test_statistics_are_cheap(gradstats_benchmark):
        found = gradstats_benchmark(model, loss_fn, batch)
        assert found.ratio("norms").median < 1.3
    ```
    Where pytest-benchmark is installed and enabled, the plain and the measured steps' times, taken in turns,
    are in the `extra_info` of the test's benchmark, whose own time is of the whole comparison.
    """

    def compare(model: Any, loss_fn: Any, batch: Any, **options: Any) -> StepBench:
        from gradstats.workbench.bench import bench_step

        try:
            benchmark = request.getfixturevalue("benchmark")
        except pytest.FixtureLookupError:
            return bench_step(model, loss_fn, batch, **options)
        arguments = (model, loss_fn, batch)
        found: StepBench = benchmark.pedantic(bench_step, args=arguments, kwargs=options)
        benchmark.extra_info["gradstats"] = found.to_dict()
        return found

    return compare
