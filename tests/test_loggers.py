"""Rows of a monitor's numbers, and the files they go to."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import nn

import gradstats
from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.loggers import CsvFile, JsonLines, read_lines


def train(log, model, optimizer, monitor, steps, size=16):
    losses = []
    for _ in range(steps):
        x = torch.randn(size, 4)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        stats = monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats, loss=loss)
        losses.append(loss.item())
    return losses


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = gradstats.attach(model, optimizer=optimizer)
    yield model, optimizer, monitor
    monitor.detach()


def test_rows_hold_what_the_monitor_knows(parts) -> None:
    model, optimizer, monitor = parts
    rows = []
    log = gradstats.Log(monitor, lambda row, step: rows.append((step, row)), every=5)
    losses = train(log, model, optimizer, monitor, 20)
    assert [step for step, _ in rows] == [1, 5, 10, 15, 20]
    last = rows[-1][1]
    assert last["samples"] == 320
    assert last["batch_size"] == 16
    assert last["loss"] == pytest.approx(sum(losses[15:]) / 5)
    noise = monitor.noise_scale()
    assert (last["noise_scale"], last["noise_scale_low"]) == (noise.value, noise.low)
    assert last["learning_rate"] == 0.1
    shares = {k: v for k, v in last.items() if k.startswith("layer_share/")}
    assert set(shares) == {f"layer_share/{n}" for n, _ in model.named_parameters()}
    assert sum(shares.values()) == pytest.approx(1)


def test_the_last_steps_are_not_lost(parts) -> None:
    model, optimizer, monitor = parts
    rows = []
    log = gradstats.Log(monitor, lambda row, step: rows.append((step, row)), every=5)
    losses = train(log, model, optimizer, monitor, 7)
    last = log.flush()
    assert [step for step, _ in rows] == [1, 5, 7]
    assert last is rows[-1][1]
    assert last["loss"] == pytest.approx(sum(losses[5:]) / 2)
    assert log.flush() is None


def test_an_epochs_short_last_step_is_not_the_batch_size(parts) -> None:
    model, optimizer, monitor = parts
    rows = []
    log = gradstats.Log(monitor, lambda row, step: rows.append(row), every=4)
    train(log, model, optimizer, monitor, 7)
    train(log, model, optimizer, monitor, 1, size=5)
    train(log, model, optimizer, monitor, 1, size=5)
    log.close()
    assert [row["batch_size"] for row in rows] == [16, 16, 16, 5]
    each = gradstats.Log(monitor, lambda row, step: rows.append(row), every=1)
    train(each, model, optimizer, monitor, 1, size=5)
    assert rows[-1]["batch_size"] == 5


def test_shares_are_those_of_the_layers(parts) -> None:
    model, _, monitor = parts
    x = torch.randn(16, 4)
    model(x).square().mean().backward()
    stats = monitor.step()
    assert stats.layer_tr_sigma is not None
    for value, layer in zip(stats.layer_tr_sigma, stats.layers.values(), strict=True):
        torch.testing.assert_close(value, layer.tr_sigma)


def test_files(parts, tmp_path) -> None:
    model, optimizer, monitor = parts
    paths = tmp_path / "logs" / "run.jsonl", tmp_path / "logs" / "run.csv"
    log = gradstats.Log(monitor, JsonLines(paths[0]), CsvFile(paths[1]), every=2)
    train(log, model, optimizer, monitor, 6)
    log.close()
    rows, spoilt = read_lines(paths[0])
    assert (spoilt, [row["step"] for row in rows]) == (0, [1, 2, 4, 6])
    with paths[1].open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows]


def test_the_last_steps_are_in_the_file_when_it_is_closed(parts, tmp_path) -> None:
    model, optimizer, monitor = parts
    log = gradstats.Log(monitor, JsonLines(tmp_path / "run.jsonl"), every=4)
    train(log, model, optimizer, monitor, 6)
    log.close()
    assert [row["step"] for row in read_lines(tmp_path / "run.jsonl")[0]] == [1, 4, 6]


def test_a_resumed_run_adds_to_its_files(parts, tmp_path) -> None:
    model, optimizer, monitor = parts
    paths = tmp_path / "run.jsonl", tmp_path / "run.csv"
    log = gradstats.Log(monitor, JsonLines(paths[0]), CsvFile(paths[1]), every=2)
    train(log, model, optimizer, monitor, 4)
    state = json.loads(json.dumps(log.state_dict()))
    log.close()
    with paths[0].open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    again = gradstats.Log(
        monitor, JsonLines(paths[0], resume=True), CsvFile(paths[1], resume=True), every=2
    )
    again.load_state_dict(state)
    train(again, model, optimizer, monitor, 2)
    again.close()
    rows, spoilt = read_lines(paths[0])
    assert (spoilt, [row["step"] for row in rows]) == (1, [1, 2, 4, 6])
    assert rows[-1]["samples"] == 96
    assert rows[-1]["seconds"] > rows[-2]["seconds"]
    with paths[1].open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "4", "6"]


def test_numbers_that_are_not_finite_are_null(tmp_path) -> None:
    sink = JsonLines(tmp_path / "x.jsonl")
    sink({"step": 1, "noise_scale": math.inf}, 1)
    assert read_lines(sink.path)[0] == [{"step": 1, "noise_scale": None}]


def test_csv_gets_columns_for_new_numbers(tmp_path) -> None:
    path = tmp_path / "x.csv"
    sink = CsvFile(path)
    sink({"step": 1, "loss": 3.0}, 1)
    sink({"step": 2, "held": 0.5}, 2)
    sink({"step": 3, "loss": 1.0}, 3)
    sink.close()
    assert path.read_text() == "step,loss,held\n1,3.0,\n2,,0.5\n3,1.0,\n"
    with path.open("a") as file:
        file.write("4,0.")  # killed while it wrote
    path.chmod(0o600)
    again = CsvFile(path, resume=True)
    again({"step": 5, "num_samples": 64, "loss": 2.0}, 5)
    again({"step": 6, "num_samples": 80, "loss": 2.0}, 6)
    again.close()
    rows = ["step,loss,held,num_samples", "1,3.0,,", "2,,0.5,", "3,1.0,,", "4,0.,,"]
    assert path.read_text().splitlines() == [*rows, "5,2.0,,64", "6,2.0,,80"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_csv_keeps_its_rows_where_the_wider_file_has_no_room(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.csv"
    sink = CsvFile(path)
    sink({"step": 1}, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.warns(UserWarning, match="takes no more rows since step 2 .No space left"):
        sink({"step": 2, "loss": 1.0}, 2)
    assert path.read_text() == "step\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_csv_refuses_new_columns_where_it_cannot_be_written_anew() -> None:
    sink = CsvFile("/dev/null")
    sink({"step": 1}, 1)
    with pytest.raises(GradStatsError, match="step 2 has loss, which the first row of /dev/null"):
        sink({"step": 2, "loss": 1.0}, 2)


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch) -> None:
    sink = JsonLines(tmp_path / "x.jsonl")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "_write", full)
    with pytest.warns(UserWarning, match="takes no more rows since step 7"):
        sink({"step": 7}, 7)
    sink({"step": 8}, 8)
    assert sink.error is not None


def test_a_file_that_cannot_be_opened_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        JsonLines(tmp_path)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_lines(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidArgumentError, match="every=0 must be at least 1"):
        gradstats.Log(None, every=0)
