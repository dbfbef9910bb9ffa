"""Whether estimates are right on average: against their own standard error, which has to be small."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def assert_unbiased(values: ArrayLike, truth: float, *, known_to: float = 0.004) -> None:
    """That the mean of independent `values` is within three standard errors of the truth.

    And that such an error is at most `known_to` of the truth: three of them are what could go unseen.
    """
    found = np.asarray(values, float)
    assert np.isfinite(found).all()
    error = found.std(ddof=1) / len(found) ** 0.5
    assert error <= known_to * abs(truth), f"known to {error / abs(truth):.2%} only"
    bias = found.mean() - truth
    assert abs(bias) <= 3 * error, f"off by {bias / error:+.1f} standard errors of {error:.3g}"
