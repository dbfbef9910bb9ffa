"""Sinks for trackers: what a real training logs is read back from each of them."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request

import pytest
import torch
from integration_tools import loader, net, rows_of
from torch import nn

import gradstats
from gradstats.errors import BackendError, InvalidArgumentError
from gradstats.integrations import extra

ODD = {"step": 9, "samples": 72, "noise_scale": math.inf, "noise_scale_low": math.nan, "loss": 1.5}
BLOCK = 2**15


def train(*sinks):
    """Rows of 6 steps; the batch size changes on the way."""
    model, rows = net(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    monitor = gradstats.attach(model, optimizer=optimizer)
    log = gradstats.Log(monitor, rows_of(rows), *sinks, every=2)
    for x, y in [*list(loader(batch=8))[:3], *list(loader(batch=24))[:3]]:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        stats = monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats, loss=loss)
    for sink in sinks:
        sink(ODD, 9)
    log.close()
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row["batch_size"] for row in rows] == [8, 8, 24, 24]
    return rows


def test_tensorboard(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradstats.integrations.tensorboard import TensorBoard

    rows = train(TensorBoard(tmp_path))
    found = EventAccumulator(str(tmp_path)).Reload()
    for name in ("tr_sigma", "batch_size", "layer_share/0.weight"):
        events = found.Scalars(f"gradstats/{name}")
        assert [e.step for e in events][:4] == [1, 2, 4, 6]
        assert [e.value for e in events][:4] == pytest.approx([row[name] for row in rows])
    last = (
        found.Scalars("gradstats/noise_scale")[-1],
        found.Scalars("gradstats/noise_scale_low")[-1],
    )
    assert (last[0].step, last[0].value) == (9, math.inf)
    assert math.isnan(last[1].value)


def test_tensorboard_with_a_writer_of_the_users(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    from gradstats.integrations.tensorboard import TensorBoard

    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoard(writer=writer, prefix="")
        sink(ODD, 9)
        sink.close()
        writer.add_scalar("still", 1.0)


def wandb_history(path):
    """Rows of an offline run: a header of 7 bytes, then records as LevelDB's log keeps them."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, parts, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(raw):
        if BLOCK - place % BLOCK < 7:  # no room for a record's head: filled up with zeros
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        parts += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(parts).history.item
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
            parts = b""
    return rows


def test_wandb_offline(tmp_path) -> None:
    wandb = pytest.importorskip("wandb")
    from gradstats.integrations.wandb import WandB

    with pytest.raises(InvalidArgumentError, match=r"call wandb.init\(\) first"):
        WandB()
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    with wandb.init(project="test", mode="offline", dir=tmp_path, settings=settings) as run:
        run.log({"other": 1}, step=100)  # the run's own step is far ahead
        rows = train(WandB())
        summary = dict(run.summary)
    assert summary["gradstats/tr_sigma"] == rows[-1]["tr_sigma"]
    assert summary["gradstats/step"] == 9
    assert summary["gradstats/noise_scale"] == math.inf
    wandb.teardown()  # its process writes what it holds back
    history = wandb_history(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    found = [row for row in history if "gradstats/batch_size" in row]
    assert [row["gradstats/step"] for row in found] == [1, 2, 4, 6]
    assert [row["gradstats/tr_sigma"] for row in found] == [row["tr_sigma"] for row in rows]


def test_mlflow(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    from gradstats.integrations.mlflow import MLflow

    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # quickest to set up; the page uses SQLite
    client = mlflow.MlflowClient(f"file:{tmp_path / 'runs'}")
    run = client.create_run(client.create_experiment("test")).info.run_id
    rows = train(MLflow(run, client=client))
    for name in ("tr_sigma", "batch_size"):
        found = client.get_metric_history(run, f"gradstats/{name}")
        assert [(m.step, m.value) for m in found] == [(row["step"], row[name]) for row in rows]
    assert client.get_metric_history(run, "gradstats/loss")[-1].step == 9
    assert all(
        math.isfinite(m.value) for m in client.get_metric_history(run, "gradstats/noise_scale")
    )


def test_prometheus() -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from gradstats.integrations.prometheus import Prometheus

    sink = Prometheus(labels={"run": "17"})
    address = sink.serve(0)
    assert address.startswith("http://127.0.0.1:")
    with pytest.raises(InvalidArgumentError, match="served already"):
        sink.serve(0)
    port = int(address.split(":")[2].split("/")[0])
    with pytest.raises(InvalidArgumentError, match=f"127.0.0.1:{port} cannot be listened on"):
        Prometheus().serve(port)

    class Fetched(list):
        def __call__(self, row, step):
            with urllib.request.urlopen(address, timeout=5) as answer:
                self.append(answer.read().decode())

        def close(self): ...

    fetched = Fetched()
    rows = train(sink, fetched)
    found = {
        (s.name, s.labels.get("parameter")): s.value
        for family in text_string_to_metric_families(fetched[3])
        for s in family.samples
        if s.labels["run"] == "17"
    }
    assert found["gradstats_tr_sigma", None] == rows[-1]["tr_sigma"]
    assert found["gradstats_step", None] == 6
    assert found["gradstats_layer_share", "0.weight"] == rows[-1]["layer_share/0.weight"]
    assert 'gradstats_noise_scale{run="17"} +Inf' in fetched[-1]
    assert 'gradstats_noise_scale_low{run="17"} NaN' in fetched[-1]
    with pytest.raises(urllib.error.URLError):  # log.close() closed it
        urllib.request.urlopen(address, timeout=5)
    sink.serve(port)  # the port is free again
    sink.close()


def test_a_missing_library_is_named_with_what_installs_it() -> None:
    with pytest.raises(BackendError, match=r"needs the package no_such.*'gradstats\[wandb\]'"):
        extra.library("no_such.part", "wandb")


def test_rows_without_what_is_not_finite() -> None:
    from gradstats.integrations.metrics import metrics

    assert json.dumps(metrics(ODD, "a/", finite=True)) == '{"a/samples": 72, "a/loss": 1.5}'
    assert "noise_scale" in metrics(ODD, "")
