"""A few of the random models; `python tests/random_models.py` runs thousands."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from random_models import examine
from random_specs import Spec, specs


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs())
def test_random_models_are_exact_or_refused(spec: Spec) -> None:
    examine(spec)
