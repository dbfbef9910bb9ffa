"""Published settings to start from, by task, where nothing was measured. None of them is a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from gradstats.errors import InvalidArgumentError

__all__ = ["STARTING_POINTS", "StartingPoint", "starting_point"]


@dataclass(frozen=True)
class StartingPoint:
    """What a publication trained with.

    `batch_size`: in `unit`, over all devices; `low` and `high`: sizes used for the task in the same source
    (or those named in `note`). `warmup`: steps, or epochs where `warmup_epochs`; `epochs`: None where the
    source counts steps. `tiny`: whether devices hold so few samples that BatchNorm suffers.
    """

    task: str
    batch_size: int
    low: int
    high: int
    unit: str
    optimizer: str
    learning_rate: float
    warmup: int
    warmup_epochs: bool
    epochs: float | None
    steps: int | None
    tiny: bool
    note: str
    source: str


STARTING_POINTS: dict[str, StartingPoint] = {
    point.task: point
    for point in (
        StartingPoint(
            "vision-classification", 256, 64, 8192, "images", "SGD", 0.1, 5, True, 90, None, False,
            "momentum 0.9, weight decay 1e-4; learning rate 0.1 × B/256, divided by 10 at epochs 30, 60, 80",
            "ResNet-50 on ImageNet: Goyal et al. 2017, arXiv:1706.02677",
        ),
        StartingPoint(
            "vision-fine-tuning", 512, 512, 512, "images", "SGD", 0.01, 0, False, None, 10_000, False,
            "momentum 0.9, no weight decay, cosine decay, gradients clipped at 1; learning "
            "rates of 0.001 to 0.03 "
            "were tried on held-out data (CIFAR)",
            "Vision Transformers: Dosovitskiy et al. 2021, arXiv:2010.11929, appendix B.1.1",
        ),
        StartingPoint(
            "segmentation", 16, 16, 16, "images", "SGD", 0.007, 0, False, None, 30_000, True,
            "momentum 0.9, polynomial decay of power 0.9; few images fit a device: BatchNorm frozen, "
            "synchronised, or replaced",
            "DeepLabv3 on PASCAL VOC: Chen et al. 2017, arXiv:1706.05587, section 4.1",
        ),
        StartingPoint(
            "detection", 16, 2, 16, "images", "SGD", 0.02, 0, False, None, 160_000, True,
            "momentum 0.9, weight decay 1e-4, 2 images on each of 8 devices; learning rate 0.02 "
            "× B/16, divided "
            "by 10 at step 120,000; BatchNorm frozen",
            "Mask R-CNN on COCO: He et al. 2017, arXiv:1703.06870; Goyal et al. 2017, "
            "arXiv:1706.02677, section 5.4",
        ),
        StartingPoint(
            "language-model", 524_288, 524_288, 3_200_000, "tokens", "AdamW", 6e-4, 715, False, None, None,
            False,
            "125 million parameters; 1.3 billion: 1 million tokens at 2e-4; 175 billion: 3.2 "
            "million at 6e-5. "
            "Betas 0.9 and 0.95, gradients clipped at 1, weight decay 0.1, cosine decay to a "
            "tenth, warm-up over "
            "375 million tokens",
            "GPT-3: Brown et al. 2020, arXiv:2005.14165, table 2.1 and appendix B",
        ),
        StartingPoint(
            "fine-tuning", 32, 16, 32, "sequences", "AdamW", 3e-5, 0, False, 3, None, False,
            "learning rates 2e-5, 3e-5 and 5e-5 and 2 to 4 epochs were tried for each data set",
            "BERT on GLUE: Devlin et al. 2019, arXiv:1810.04805, appendix A.3",
        ),
        StartingPoint(
            "lora", 8, 8, 128, "sequences", "AdamW", 2e-4, 500, False, 5, None, False,
            "rank 4 on the query and value weights, α = 32, linear decay; the largest size is that of GPT-3",
            "LoRA of GPT-2 on E2E: Hu et al. 2021, arXiv:2106.09685, appendix D",
        ),
        StartingPoint(
            "rl", 256, 64, 256, "transitions", "Adam", 2.5e-4, 0, False, 3, None, False,
            "PPO on Atari: 8 actors, 128 steps each, 3 epochs over them, rate and clipping decayed to 0; for "
            "continuous control 64 transitions, 10 epochs and 3e-4. The noise scale grows a lot "
            "while training",
            "PPO: Schulman et al. 2017, arXiv:1707.06347, appendix A",
        ),
        StartingPoint(
            "tabular", 256, 256, 1024, "rows", "AdamW", 1e-4, 0, False, None, None, False,
            "weight decay 1e-5, no decay of the rate, stopped early on held-out data; 512 and "
            "1,024 for larger "
            "tables. Try gradient-boosted trees too",
            "FT-Transformer: Gorishniy et al. 2021, arXiv:2106.11959",
        ),
        StartingPoint(
            "contrastive", 4096, 256, 8192, "images", "LARS", 4.8, 10, True, 100, None, False,
            "learning rate 0.3 × B/256, weight decay 1e-6, cosine decay; each sample's loss "
            "needs the others of "
            "its batch, so larger batches give another loss, and no sample has a gradient of its own",
            "SimCLR: Chen et al. 2020, arXiv:2002.05709",
        ),
        StartingPoint(
            "diffusion", 128, 64, 128, "images", "Adam", 2e-4, 5000, False, None, 800_000, False,
            "CIFAR-10; 64 images at 2e-5 for 256 × 256 pixels; averaged weights (decay 0.9999) are sampled "
            "from. The warm-up is that of the published code",
            "DDPM: Ho et al. 2020, arXiv:2006.11239, appendix B",
        ),
    )
}  # fmt: skip


def starting_point(task: str) -> StartingPoint:
    """Raises InvalidArgumentError for a task that is not in the table."""
    found = STARTING_POINTS.get(task)
    if found is None:
        raise InvalidArgumentError(
            f"task={task!r} is not known here; use {', '.join(STARTING_POINTS)}"
        )
    return found
