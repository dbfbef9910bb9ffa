"""The callback in real runs of Lightning, against a loop by hand."""

from __future__ import annotations

import csv
import functools
import warnings

import pytest
import torch
from integration_tools import CLIP, data, loader, net, plain, require_same, rows_of
from torch import nn
from torch.utils.data import DataLoader

import gradstats
import gradstats.order
from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.integrations.schedule import Schedule
from gradstats.schedulers import milestones

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from gradstats.integrations.lightning import GradStatsCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Module(lightning.LightningModule):
    def __init__(self, rate=0.05):
        super().__init__()
        self.net, self.rate = net(), rate

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module, callback, tmp_path, *, ckpt_path=None, batches=None, **options):
    settings = {
        "accelerator": "cpu", "max_epochs": 1, "gradient_clip_val": CLIP, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "logger": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    callbacks = [callback, *options.pop("callbacks", [])]
    trainer = lightning.Trainer(callbacks=callbacks, **{**settings, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|litlogger).*")
        trainer.fit(module, batches or loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("precision", "accumulation"),
    [("32-true", 1), ("32-true", 5), ("bf16-mixed", 2), ("scaled", 2)],
)
def test_the_numbers_of_a_plain_loop(tmp_path, precision, accumulation) -> None:
    """5 does not divide the 12 batches of the epoch: its last step is shorter."""
    rows, module = [], Module()
    callback = GradStatsCallback(sinks=[rows_of(rows)])
    options = {"precision": precision}
    if (
        precision == "scaled"
    ):  # fp16's way of stepping, whose gradients are unscaled before clipping
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        options = {"plugins": plugin}
    fit(module, callback, tmp_path, accumulate_grad_batches=accumulation, **options)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    wanted = plain(model, loader(), accumulation, optimizer, autocast=precision == "bf16-mixed")
    require_same(rows, wanted)
    for one, other in zip(module.net.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert callback.monitor.noise_scale().num_samples == 96


SIZES = functools.partial(milestones, sizes={0: 16, 32: 24})  # asked for after step 2, of 4 batches
GROWING = Schedule(SIZES, rule="linear", every=1)


def test_the_batch_size_changes_and_the_learning_rate_with_it(tmp_path) -> None:
    """3 batches a step from step 4 on: 6 is the first number of batches that 2 and 3 divide."""
    rows, module = [], Module()
    callback = GradStatsCallback(sinks=[rows_of(rows)], schedule=GROWING)
    trainer = fit(module, callback, tmp_path, accumulate_grad_batches=2)
    model = net()
    require_same(
        rows, plain(model, loader(), 2, torch.optim.SGD(model.parameters(), 0.05), change={3: 3})
    )
    for one, other in zip(module.net.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert trainer.accumulate_grad_batches == 3
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05] * 3 + [0.075] * 2)
    assert [(c.step, c.batch_size) for c in callback.run.follower.changes] == [(3, 24)]
    # 96 samples are 6 steps of 16, though there were 5 steps.
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6
    assert not hasattr(trainer.optimizers[0], "scaled_by") or not trainer.optimizers[0].scaled_by


@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path, stop) -> None:
    """From within the first epoch, and from its end; with the accumulation that had been reached."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    kind = (
        stateful.StatefulDataLoader if stop == 4 else DataLoader
    )  # Lightning finds no place in others

    def run(epochs, **options):
        rows = []
        callback = GradStatsCallback(sinks=[rows_of(rows)], schedule=GROWING)
        fit(
            Module(), callback, tmp_path, max_epochs=epochs, accumulate_grad_batches=2,
            batches=kind(data(), batch_size=8), **options,
        )  # fmt: skip
        return rows, callback

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, callback = run(2, callbacks=[keep], enable_checkpointing=True)
    rows, again = run(2, ckpt_path=tmp_path / f"step={stop}.ckpt")
    require_same(rows, whole[stop:])
    found, wanted = again.run.state_dict(), callback.run.state_dict()
    assert found["monitor"] == wanted["monitor"]
    assert found["schedule"] == wanted["schedule"]


def test_batches_that_training_step_leaves_out(tmp_path) -> None:
    """The last one of step 2, both of step 3, and the first of step 4."""

    class Choosy(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (3, 4, 5, 6) else super().training_step(batch, batch_idx)

    rows = []
    callback = GradStatsCallback(sinks=[rows_of(rows)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", gradstats.order.MissingStepWarning)
        fit(Choosy(), callback, tmp_path, accumulate_grad_batches=2)
    assert [row["batch_size"] for row in rows] == [16, 8, 8, 16, 16]
    assert callback.monitor.noise_scale().num_samples == 64


def test_loggers_get_the_numbers(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    callback = GradStatsCallback(log_every=5, prefix="noise/", layers=True)
    trainer = fit(Module(), callback, tmp_path, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        table = [row for row in csv.DictReader(file) if row["noise/tr_sigma"]]
    assert [row["step"] for row in table] == ["1", "5", "10", "12"]
    noise = callback.monitor.noise_scale()
    assert float(table[-1]["noise/noise_scale"]) == pytest.approx(noise.value)
    assert "noise/layer_share/net.0.weight" in table[0]
    assert float(trainer.callback_metrics["noise/noise_scale"]) == pytest.approx(noise.value)


def test_the_callback_serves_pytorch_lightning(tmp_path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Same(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.rate = net(), 0.05

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    rows = []
    trainer = other.Trainer(
        accelerator="cpu", max_epochs=1, gradient_clip_val=CLIP, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[GradStatsCallback(sinks=[rows_of(rows)], log_every=1)],
    )  # fmt: skip
    trainer.fit(Same(), loader())
    model = net()
    require_same(rows, plain(model, loader(), 1, torch.optim.SGD(model.parameters(), 0.05)))


def test_refused(tmp_path) -> None:
    with pytest.raises(GradStatsError, match="nothing was measured yet"):
        _ = GradStatsCallback().monitor
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(InvalidArgumentError, match="automatic_optimization=False"):
        fit(module, GradStatsCallback(), tmp_path, gradient_clip_val=None)


def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path) -> None:
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    module, callback = Failing(), GradStatsCallback()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, callback, tmp_path)
    assert callback.monitor.noise_scale().num_samples == 40
    gradstats.attach(module).detach()
