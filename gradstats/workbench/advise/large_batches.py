"""What to do where a batch is large: by itself, or for the data."""

from __future__ import annotations

import math

from gradstats.estimators import readable, samples_ratio
from gradstats.workbench.advise.remark import Remark

__all__ = ["above_noise", "large_batch_remarks", "why_large"]

GOYAL_LIMIT = 8192  # samples up to which the linear rule kept ResNet-50's accuracy on ImageNet
KESKAR_PART = 0.1  # of the data: what Keskar et al. 2017 (arXiv:1609.04836) call a large batch


def why_large(batch_size: int, data_samples: int | None) -> list[str]:
    """In what ways a batch is large; empty where it is not."""
    found = []
    if batch_size > GOYAL_LIMIT:
        found.append(
            f"{batch_size:,} samples are more than the {GOYAL_LIMIT:,} up to which the linear rule of the "
            "learning rate held on ImageNet (Goyal et al. 2017, arXiv:1706.02677)"
        )
    if data_samples and batch_size >= KESKAR_PART * data_samples:
        found.append(
            f"a batch holds {batch_size / data_samples:.0%} of the data, and from 10% on they were found "
            "to end in sharper minima (Keskar et al. 2017, arXiv:1609.04836)"
        )
    return found


def above_noise(batch_size: int, noise_high: float) -> list[Remark]:
    """Where a batch is surely above the noise scale, whose upper end is given."""
    if not math.isfinite(noise_high) or batch_size <= noise_high:
        return []
    more = samples_ratio(batch_size, noise_high)
    text = (
        f"the batch is above the noise scale's interval: a target takes {readable(more)} × the "
        "fewest samples "
        "or more, for the sake of time"
    )
    return [Remark("batch size", text, "McCandlish et al. 2018, arXiv:1812.06162, section 2.3")]


def large_batch_remarks(whys: list[str], optimizer: str | None) -> list[Remark]:
    """What helps there, the simplest first."""
    if not whys:
        return []
    adaptive = optimizer is not None and (
        "adam" in optimizer.lower() or optimizer.lower() == "lamb"
    )
    layered, source = (
        ("LAMB", "You et al. 2020, arXiv:1904.00962")
        if adaptive
        else ("LARS", "You et al. 2017, arXiv:1708.03888")
    )
    own = "Adam" if adaptive else "SGD with Nesterov momentum"
    return [
        *(Remark("large batch", why) for why in whys),
        Remark(
            "large batch",
            "raise the learning rate by a gradual warm-up, over some epochs",
            "Goyal et al. 2017, arXiv:1706.02677, section 2.2",
        ),
        Remark(
            "large batch",
            f"first tune {own} itself: it reached the accuracy of {layered} at batches of 32 thousand",
            "Nado et al. 2021, arXiv:2102.06356",
        ),
        Remark(
            "large batch",
            f"{layered} (gradstats.optim.{layered}) scales each layer's step by its weights' norm",
            source,
        ),
        Remark(
            "large batch",
            "label smoothing of 0.1 for classification: nn.CrossEntropyLoss(label_smoothing=0.1)",
            "Szegedy et al. 2016, arXiv:1512.00567; with large batches, Mikami et al. 2018, arXiv:1811.05233",
        ),
        Remark(
            "large batch",
            "average weights over the end of the training (torch.optim.swa_utils.AveragedModel and SWALR, "
            "then update_bn where there is BatchNorm): it finds flatter minima",
            "Izmailov et al. 2018, arXiv:1803.05407; with large batches, Gupta et al. 2020, arXiv:2001.02312",
        ),
        Remark(
            "large batch",
            "train for as many steps as the small batch took, where quality matters more than time",
            "Hoffer et al. 2017, arXiv:1705.08741",
        ),
    ]
