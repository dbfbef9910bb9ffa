"""The examples of docs/, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstats
from gradstats.schedulers import instead_of_decay, noise_scale

DOCS = Path(__file__).parent.parent / "docs"


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


LOOP, DECAY, ADASCALE, CHECKPOINT = examples("training.md")
TIMED, RECOMMENDED, RANKS, COMPARED = examples("choosing.md")
PROXY, PARTS, MOMENTUM, GEOMETRY, CURVATURE = examples("noise.md")


@pytest.fixture
def names(tmp_path):
    """What the examples take for granted."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x = torch.randn(640, 6)
    dataset = TensorDataset(x, x[:, :3] + torch.randn(640, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    return {
        "torch": torch,
        "gradstats": gradstats,
        "model": model,
        "dataset": dataset,
        "loader": gradstats.StepLoader(dataset, micro_batch_size=16, batch_size=32),
        "loss_fn": nn.MSELoss(),
        "optimizer": optimizer,
        "monitor": gradstats.attach(model, optimizer=optimizer),
        "epochs": 6,
        "path": tmp_path / "checkpoint",
        "noise_scale": noise_scale,
        "instead_of_decay": instead_of_decay,
    }


def error(names) -> float:
    x, y = names["dataset"].tensors
    with torch.no_grad():
        return float(nn.functional.mse_loss(names["model"](x), y))


def test_the_loop_learns_and_changes_its_batch_size_and_goes_on_from_a_checkpoint(names):
    before = error(names)
    exec(LOOP, names)
    assert error(names) < 0.8 * before
    assert names["loader"].epoch == 6
    assert names["scheduler"].changes
    assert names["scaling"].batch_size == names["loader"].batch_size
    kept = names["scheduler"].state_dict()
    exec(CHECKPOINT, names)
    assert names["scheduler"].state_dict() == kept


def test_the_batch_grows_as_the_schedule_decays(names):
    before = error(names)
    names["monitor"].detach()
    made, loop = DECAY.split("for step in loader", 1)
    exec(made, names)
    for _ in range(5):
        exec("for step in loader" + loop, names)
    assert error(names) < before
    assert names["scheduler"].batch_size == 64
    # 5 epochs of 640 samples are 100 steps of 32, whatever the batches were.
    assert names["schedule"].last_epoch == 100


def test_adascale_takes_its_gain_from_the_monitor(names):
    before = error(names)
    exec(ADASCALE, names)
    assert error(names) < before
    assert 1 < names["optimizer"].gain <= 2
    assert names["schedule"].last_epoch == int(names["optimizer"].scale_invariant_steps)


def test_the_step_is_timed_and_the_advice_rests_on_it(names, capsys):
    exec(LOOP, names)
    names["x"], names["y"] = names["dataset"].tensors
    before = error(names)
    exec(TIMED, names)
    assert error(names) == before
    exec(RECOMMENDED, names)
    assert len(names["advice"].curve) > 1
    assert all(point.price > 0 for point in names["advice"].curve)
    exec(RANKS, names)
    exec(COMPARED, names)
    out = capsys.readouterr().out
    assert out.startswith("a step takes ")
    assert "of [1, 2, 4, 8] ranks, 1 reach it with the least device time" in out
    assert "1,000 steps of 64 (64,000 samples) get " in out


def test_methods(names, capsys):
    with pytest.raises(gradstats.AttachError, match="no trainable normalisation layer"):
        exec(PROXY, names)
    names["monitor"].detach()
    names["model"] = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3))
    exec(PROXY, names)
    assert names["monitor"]._source.calibration is None
    names["monitor"].detach()
    x, y = names["dataset"].tensors
    pairs = list(zip(x.split(16), y.split(16), strict=True))
    names["steps"] = [pairs[i : i + 4] for i in range(0, len(pairs), 4)]
    exec(PARTS, names)
    assert "in 10 steps, by comparing micro-batches" in capsys.readouterr().out


def test_what_the_optimizer_sees(names, capsys):
    names["optimizer"] = torch.optim.Adam(names["model"].parameters(), 1e-3)
    x, y = names["dataset"].tensors
    names["loader"] = list(zip(x.split(16), y.split(16), strict=True))
    names["monitor"].detach()
    exec(MOMENTUM, names)
    names["monitor"].detach()
    exec(GEOMETRY, names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("noise scale under Adam's preconditioner ")
    assert [line.split()[0] for line in lines[1:]] == ["weight", "bias"]
    assert names["advice"].batch_size >= 1
    names["loss_fn_of_batch"] = lambda model, batch: names["loss_fn"](model(batch[0]), batch[1])
    names["batches"] = names["loader"][:15]
    exec(CURVATURE, names)
    assert "the best learning rate of plain SGD is" in capsys.readouterr().out
