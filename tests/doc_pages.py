"""What the pages of the documentation take for granted, and what must hold after their examples.

A function for a page is a generator: what comes before its first `yield` is the page's prelude, and at
each `yield` the next example is executed in `names`. `out()` is what was printed since the last call.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doc_blocks import ROOT, blocks
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

import gradstats
from gradstats.schedulers import instead_of_decay, noise_scale
from gradstats.workbench.workload import load

Names = dict[str, Any]
Out = Callable[[], str]


def common(folder: Any) -> Names:
    """A small regression, as the examples call its parts."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x = torch.randn(640, 6)
    dataset = TensorDataset(x, x[:, :3] + torch.randn(640, 3))
    return {
        "torch": torch,
        "nn": nn,
        "gradstats": gradstats,
        "model": model,
        "dataset": dataset,
        "x": x,
        "y": dataset.tensors[1],
        "loader": pairs(dataset, 16),
        "loss_fn": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.02),
        "epochs": 6,
        "path": folder / "checkpoint",
    }


def pairs(dataset: TensorDataset, size: int) -> list[tuple[torch.Tensor, ...]]:
    """The batches of an epoch."""
    return list(zip(*(part.split(size) for part in dataset.tensors), strict=True))


def error(names: Names) -> float:
    with torch.no_grad():
        return float(nn.functional.mse_loss(names["model"](names["x"]), names["y"]))


def attached(names: Names) -> None:
    names["monitor"] = gradstats.attach(names["model"], optimizer=names["optimizer"])


def train(names: Names) -> None:
    for x, y in names["loader"]:
        names["loss_fn"](names["model"](x), y).backward()
        names["monitor"].step()
        names["optimizer"].step()
        names["optimizer"].zero_grad()


def stepwise(names: Names) -> None:
    names["loader"] = gradstats.StepLoader(names["dataset"], micro_batch_size=16, batch_size=32)


def digits(names: Names) -> None:
    """The training of examples/digits.py for 200 steps of 32, which pages show the outcome of."""
    made = load("examples.digits:training", seed=0)
    names |= {"model": made.model, "optimizer": made.optimizer, "loss_fn": made.loss_fn}
    names["loader"] = list(itertools.islice(made.batches(32), 200))
    names["x"], names["y"] = names["loader"][0]


def same_words(printed: str, page: str) -> None:
    """That a page shows what was printed, but for figures (rounding differs) and ends of lines."""
    shown = [b.code for b in blocks(ROOT / page) if b.language == "text"]
    assert words(printed) in map(words, shown)


def words(text: str) -> str:
    return re.sub(r"[\d,.]*\d", "0", " ".join(text.split()))


def readme(names: Names, out: Out) -> Iterator[None]:
    yield  # the loop
    assert names["monitor"].noise_scale().num_steps == 40
    names["monitor"].detach()
    names["batch"] = names["loader"][0]
    names["loss_fn"] = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    yield  # check
    assert "exact" in out()


def index(names: Names, out: Out) -> Iterator[None]:
    digits(names)
    yield  # the loop
    same_words(out(), "docs/index.md")
    names["monitor"].detach()
    yield  # check
    assert names["report"].ok


def how_it_works(names: Names, out: Out) -> Iterator[None]:
    yield  # a record
    names["monitor"].detach()
    yield  # a layer's norms, three ways


def steps(names: Names, out: Out) -> Iterator[None]:
    digits(names)
    attached(names)
    train(names)
    yield  # compared
    same_words(out(), "docs/steps.md")


def reading(names: Names, out: Out) -> Iterator[None]:
    yield
    assert names["noise"].num_steps == 40
    assert all(hasattr(names["noise"], field) for field in ("low", "high", "actionable"))


def recipes(names: Names, out: Out) -> Iterator[None]:
    yield  # one GPU
    assert names["monitor"].noise_scale().num_steps == 40
    names["monitor"].detach()
    yield  # accumulation
    assert names["monitor"].noise_scale().num_steps == 10
    names["monitor"].detach()
    store = f"file://{names['path']}.store"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        yield  # DistributedDataParallel
        assert names["monitor"].noise_scale().num_steps == 40
        names["monitor"].detach()
        names["model"] = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        yield  # FSDP2
        assert names["monitor"].noise_scale().num_steps == 40
    finally:
        torch.distributed.destroy_process_group()
    names["model"] = nn.Linear(6, 3)
    yield  # LoRA
    assert names["monitor"].noise_scale().coverage == 1
    images, masks = torch.randn(48, 3, 12, 12), torch.randint(5, (48, 12, 12))
    names["scenes"] = TensorDataset(images, masks)
    yield  # segmentation
    assert names["monitor"].noise_scale().num_samples == 48
    yield  # BatchNorm
    assert names["monitor"].noise_scale().method == "micro_batch"
    assert names["monitor"].noise_scale().num_steps == 6
    names["model"] = nn.Linear(6, 3)
    yield  # packed
    names["language_model"] = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32))
    yield  # uneven


def commands(names: Names, out: Out) -> Iterator[None]:
    names |= {"train": names["dataset"], "held_out": names["dataset"]}
    yield  # a factory
    assert names["training"]().num_validation == 640


def critical(names: Names, out: Out) -> Iterator[None]:
    attached(names)
    train(names)
    names["monitor"].detach()
    Path("runs").mkdir()
    Path("runs/critical.json").write_text(
        json.dumps({"calibration": {"value": 2.0, "low": 1.8, "high": 2.2, "steps": 0}})
    )
    yield
    assert "the critical batch size is 2 (1.8 to 2.2) times that" in out()


def report(names: Names, out: Out) -> Iterator[None]:
    attached(names)
    yield  # a log
    assert len(gradstats.loggers.read_log("run.jsonl").rows) == 5
    yield  # a report of it
    assert out()
    assert "<svg" in Path("report.html").read_text("utf-8")


def bench(names: Names, out: Out) -> Iterator[None]:
    yield  # a step
    assert "gradstats norms" in out()
    yield  # a fixture
    kinds: list[str] = []
    cheap = SimpleNamespace(ratio=lambda kind: kinds.append(kind) or SimpleNamespace(median=1.0))
    names["test_statistics_are_cheap"](lambda model, loss_fn, batch: cheap)
    assert names["found"].ratio(*kinds)  # of a kind that there is


def measured(names: Names, out: Out) -> Iterator[None]:
    names["batch"] = names["loader"][0]
    names["loss_fn"] = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    yield  # check
    assert names["report"].ok


def training(names: Names, out: Out) -> Iterator[None]:
    attached(names)
    stepwise(names)
    names |= {"noise_scale": noise_scale, "instead_of_decay": instead_of_decay}
    before = error(names)
    yield  # the loop
    assert error(names) < 0.8 * before
    assert names["loader"].epoch == 6
    assert names["scheduler"].changes
    assert names["scaling"].batch_size == names["loader"].batch_size
    kept = {key: names[key] for key in ("optimizer", "loader", "scheduler")}
    names["monitor"].detach()
    names["loader"] = gradstats.StepLoader(
        ConcatDataset([names["dataset"]] * 5), micro_batch_size=16, batch_size=32
    )
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), 0.02)
    yield  # a batch that grows as the schedule decays
    assert names["scheduler"].batch_size == 64
    assert names["schedule"].last_epoch == 100  # steps of 32, whatever the batches were
    stepwise(names)
    names["monitor"] = gradstats.attach(names["model"])
    nn.init.zeros_(names["model"].weight)
    before = error(names)
    yield  # AdaScale
    assert error(names) < before
    assert 1 < names["optimizer"].gain <= 2
    assert names["schedule"].last_epoch == int(names["optimizer"].scale_invariant_steps)
    names |= kept
    saved = names["scheduler"].state_dict()
    yield  # checkpoints
    assert names["scheduler"].state_dict() == saved


def choosing(names: Names, out: Out) -> Iterator[None]:
    attached(names)
    train(names)
    before = error(names)
    yield  # timed
    assert error(names) == before
    assert out().startswith("a step takes ")
    yield  # advice
    assert len(names["advice"].curve) > 1
    assert all(point.price > 0 for point in names["advice"].curve)
    yield  # ranks
    assert "of [1, 2, 4, 8] ranks, 1 reach it with the least device time" in out()
    yield  # compared
    assert out().startswith("1,000 steps of 64 (64,000 samples) get ")


def noise(names: Names, out: Out) -> Iterator[None]:
    names["model"] = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3))
    yield  # a proxy
    assert names["monitor"]._source.calibration is None
    names["monitor"].detach()
    attached(names)
    names["monitor"].detach()
    batches = names["loader"]
    names["steps"] = [batches[i : i + 4] for i in range(0, len(batches), 4)]
    yield  # micro-batches
    assert "in 10 steps, by comparing micro-batches" in out()
    names["monitor"].detach()
    names["optimizer"] = torch.optim.Adam(names["model"].parameters(), 1e-3)
    yield  # from momentum
    names["monitor"].detach()
    yield  # geometry
    lines = out().splitlines()
    assert lines[0].startswith("noise scale under Adam's preconditioner ")
    assert [line.split()[0] for line in lines[1:]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names["advice"].batch_size >= 1
    names["loss_fn_of_batch"] = lambda model, batch: nn.functional.mse_loss(
        model(batch[0]), batch[1]
    )
    names["batches"] = batches[:15]
    yield  # curvature
    assert "the best learning rate of plain SGD is" in out()


def integrations(names: Names, out: Out) -> Iterator[None]:
    for library in ("lightning", "transformers", "accelerate", "tensorboard", "wandb", "mlflow"):
        names[library] = pytest.importorskip(library)
    pytest.importorskip("prometheus_client")
    import test_lightning
    import test_transformers

    names["lightning"] = names["lightning"].pytorch
    names["module"], names["gpt2"] = test_lightning.Module(), test_transformers.gpt2()
    names["texts"], small = test_transformers.texts(), names["loader"]
    names["loader"] = test_lightning.loader()
    names["arguments"] = names["transformers"].TrainingArguments(
        "runs", max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    yield  # Lightning
    assert names["callback"].monitor.noise_scale().num_steps == 12
    yield  # transformers
    assert names["callback"].monitor.noise_scale().num_steps == 3
    names["accelerator"] = names["accelerate"].Accelerator(cpu=True, gradient_accumulation_steps=2)
    names["loader"] = small
    yield  # Accelerate
    assert names["watch"].monitor.noise_scale().num_steps == 20
    yield  # a schedule
    names["model"] = nn.Linear(6, 3)
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), 0.02)
    attached(names)
    yield  # TensorBoard
    assert list(Path("runs/tensorboard").glob("events.*"))
    yield  # Weights & Biases
    names["run"].finish()
    yield  # MLflow
    names["sink"]({"step": 1, "loss": 1.5, "noise_scale": math.inf}, 1)
    kept = names["mlflow"].get_run(names["sink"].run_id).data.metrics
    assert kept == {"gradstats/loss": 1.5}
    names["mlflow"].end_run()
    names["mlflow"].set_tracking_uri("")
    out()
    yield  # Prometheus
    assert out().startswith("http://127.0.0.1:")


PRELUDES: dict[str, Callable[[Names, Out], Iterator[None]]] = {
    "README.md": readme,
    "docs/commands/bench.md": bench,
    "docs/commands/critical.md": critical,
    "docs/commands/index.md": commands,
    "docs/commands/report.md": report,
    "docs/how_it_works.md": how_it_works,
    "docs/index.md": index,
    "docs/integrations.md": integrations,
    "docs/measured.md": measured,
    "docs/reading.md": reading,
    "docs/recipes.md": recipes,
    "docs/steps.md": steps,
    "docs/training.md": training,
    "docs/choosing.md": choosing,
    "docs/noise.md": noise,
}


def prelude(page: str, names: Names, out: Out) -> Iterator[None]:
    """The page's own, or none."""
    if page not in PRELUDES:
        pytest.fail(f"{page} has examples in Python and no prelude in tests/doc_pages.py")
    return PRELUDES[page](names, out)
