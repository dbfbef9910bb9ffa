"""Workloads from factories, and the files that tools write."""

from __future__ import annotations

import json
import math

import pytest
import torch
import workloads
from torch import nn

import gradstats
from gradstats.errors import InvalidArgumentError
from gradstats.workbench import saved
from gradstats.workbench.workload import load, workload


@pytest.mark.parametrize("name", ["tensors", "dataset", "loader", "whole"])
def test_factories_make_workloads(name) -> None:
    made = load(f"workloads:{name}")
    draw = made.batches(24, seed=1)
    x, y = next(draw)
    assert x.shape == (24, 8)
    assert y.shape == (24, 1)
    loss = made.loss((x, y))
    loss.backward()
    assert made.optimizer.param_groups[0]["params"][0].grad is not None
    assert made.default_optimizer == (name in ("tensors", "loader"))
    assert made.batch_size == {"loader": 32, "whole": 32}.get(name)


def test_the_seed_makes_the_same_model() -> None:
    one, same, other = (load("workloads:dataset", seed=s).model[0].weight for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_batches_are_shuffled_epochs_without_end() -> None:
    made = workload((nn.Linear(1, 1), nn.MSELoss(), (torch.arange(10.0)[:, None],) * 2))
    draw = made.batches(4, seed=2)
    seen = torch.cat([next(draw)[0] for _ in range(5)]).flatten()
    for epoch in seen.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    later = torch.cat([next(made.batches(4, seed=2, start=12))[0]]).flatten()
    assert torch.equal(later, seen[12:16])
    large, _ = next(made.batches(25, seed=2))  # larger than the data
    assert torch.equal(large.flatten()[:20], seen)


def test_validation_is_seen_once() -> None:
    made = load("workloads:whole")
    sizes = [len(x) for x, _ in made.validation_batches(48)]
    assert sizes == [48, 48, 32]
    with pytest.raises(InvalidArgumentError, match="no samples held out"):
        next(load("workloads:dataset").validation_batches(8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_data", "neither a dataset with indices and a length, nor a DataLoader"),
        ("wrong_optimizer", "optimizer is a str"),
        ("optimizer_of_another_model", "SGD holds none of the model's trainable parameters"),
        ("regression", r"must return \(model, loss_fn, data\), .* not a TensorDataset"),
    ],
)
def test_wrong_factories_are_refused(name, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load(f"workloads:{name}")


def test_a_loss_must_be_a_scalar() -> None:
    made = load("workloads:no_scalar")
    with pytest.raises(
        InvalidArgumentError, match=r"tensor of shape \(4, 1\); it must give the mean"
    ):
        made.loss(next(made.batches(4)))


def test_files_are_whole_or_not_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / "result.json"
    saved.write(path, "vram", {"size": 3, "high": math.inf})
    assert saved.read(path, "vram", "sweep")["high"] is None
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InvalidArgumentError, match=r"cannot be written \(No space left\)"):
        saved.write(path, "vram", {"size": 4})
    assert saved.read(path, "vram")["size"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "gradstats vram", "ver', "not JSON from line 1"),
        (
            '{"kind": "gradstats sweep", "version": 1}',
            "holds gradstats sweep; what is needed is a file",
        ),
        ("[1]", "holds no result of gradstats"),
        ('{"kind": "gradstats vram", "version": 9}', "is of version 9"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, text, message) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        saved.read(path, "vram")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        saved.read(tmp_path / "absent.json", "vram")


def test_environment_is_plain() -> None:
    assert json.dumps(saved.environment("rich"))
    assert saved.environment()["versions"]["torch"] == torch.__version__


def test_top_level_names() -> None:
    assert gradstats.Workload is workloads.gradstats.Workload
