"""The learning rate of a plan, and how long to warm it up. Numbers and words only."""

from __future__ import annotations

import math

from gradstats.advice import RULES, scale_learning_rate
from gradstats.batch_advice import BatchSizeAdvice
from gradstats.estimators import readable
from gradstats.workbench.advise.evidence import Evidence, RatePoint

__all__ = ["learning_rate_for", "warm_up_for"]

BETA2 = 0.999  # torch's own, where the optimizer's is not known
GOYAL_EPOCHS = 5  # of warm-up for a learning rate that was raised (Goyal et al. 2017, section 2.2)
MOST = 0.1  # of the training: warm-ups longer than that are cut


def learning_rate_for(
    evidence: Evidence, advice: BatchSizeAdvice
) -> tuple[RatePoint | None, list[str]]:
    """The rate for the advised batch, with its range where that was measured, and why; None: not known.

    The range test at the nearest batch size counts before the present rate. It is brought to the advised
    size by the exponent that was fitted to several sizes, else by the rule for the optimizer.
    """
    size = advice.batch_size
    if not evidence.rates:
        rate = advice.learning_rate
        return None if rate is None else RatePoint(size, rate, None, None), []
    near = min(evidence.rates, key=lambda p: abs(math.log(p.batch_size / size)))
    tested = f"a range test suggests {near.suggested:.3g} at a batch of {near.batch_size:,}"
    if near.batch_size == size:
        return near, [tested]
    if evidence.rate_noise is not None:
        noise = evidence.rate_noise
        factor = scale_learning_rate(1.0, near.batch_size, size, rule="noise", noise=noise)
        how = f"brought to {size:,} by 1/(1 + {readable(noise)}/B), as measured"
    elif evidence.exponent is not None:
        factor = (size / near.batch_size) ** evidence.exponent
        how = f"brought to {size:,} by the power {evidence.exponent:.2f} of the batch, as measured"
    else:
        rule = RULES.get(str(evidence.optimizer).lower())
        if rule is None:
            return None, [f"{tested}, and no rule is known for this optimizer at {size:,}"]
        known = math.nan if evidence.noise is None else evidence.noise.value
        if rule == "noise" and not math.isfinite(known):
            return None, [f"{tested}; the rule to bring it to {size:,} needs a noise scale"]
        factor = scale_learning_rate(1.0, near.batch_size, size, rule=rule, noise=known)
        how = f'brought to {size:,} by rule "{rule}" of scale_learning_rate'
    low, high = (None if end is None else end * factor for end in (near.low, near.high))
    return RatePoint(size, near.suggested * factor, low, high), [f"{tested}, {how}"]


def warm_up_for(
    evidence: Evidence, batch_size: int, rate: float | None, steps: int | None
) -> tuple[int | None, list[str]]:
    """Steps of linear warm-up, and why; None where it is not known how long an epoch is.

    Adam and its kin: 2/(1 − β₂) steps (Ma and Yarats 2021, arXiv:1910.04209). Others: five epochs where
    the learning rate was raised (Goyal et al. 2017, arXiv:1706.02677, section 2.2), else none.
    """
    before = evidence.learning_rate
    raised = before is not None and rate is not None and rate > before * (1 + 1e-9)
    adaptive = RULES.get(str(evidence.optimizer).lower()) == "sqrt"
    if adaptive:
        betas = evidence.betas
        beta2 = betas[1] if betas is not None and len(betas) > 1 and betas[1] < 1 else BETA2
        wanted = math.ceil(2 / (1 - beta2) - 1e-6)
        why = f"warm-up over 2/(1 − β₂) = {wanted:,} steps (Ma and Yarats 2021, arXiv:1910.04209)"
    elif not raised:
        return 0, []
    elif evidence.data_samples is None:
        text = (
            "warm up the raised learning rate over 5 epochs (Goyal et al. 2017, arXiv:1706.02677)"
        )
        return None, [text]
    else:
        wanted = math.ceil(GOYAL_EPOCHS * evidence.data_samples / batch_size)
        why = (
            f"warm-up of the raised learning rate over {GOYAL_EPOCHS} epochs "
            "(Goyal et al. 2017, arXiv:1706.02677)"
        )
    if steps is not None and wanted > MOST * steps:
        wanted = max(1, round(MOST * steps))
        why += f", cut to a tenth of the training: {wanted:,} steps"
    return wanted, [why]
