"""`Watch` in real loops of Accelerate, against a loop by hand."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from integration_tools import CLIP, loader, net, plain, require_same, rows_of
from torch import nn

from gradstats.errors import InvalidArgumentError
from gradstats.integrations.schedule import Schedule
from gradstats.schedulers import milestones

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.tracking import GeneralTracker  # noqa: E402

from gradstats.integrations.accelerate import Watch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = functools.partial(milestones, sizes={0: 16, 32: 24})  # asked for after step 2, of 4 batches
GROWING = Schedule(SIZES, rule="linear", every=1, micro_batch_size=8)


class Kept(GeneralTracker):
    """A tracker as users write them."""

    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.seen = []

    @property
    def tracker(self):
        return self.seen

    def log(self, values, step=None, **_):
        self.seen.append((step, values))


class Training:
    """Everything that a run has, made anew as in another process."""

    def __init__(self, accumulation, tracker=None, precision="no", **options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision,
            log_with=tracker,
        )  # fmt: skip
        self.accelerator.init_trackers("test")
        self.rows = []
        self.plain = net()
        optimizer = torch.optim.SGD(self.plain.parameters(), 0.05)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.plain, optimizer, loader()
        )
        settings = {"log_every": 1, "sinks": [rows_of(self.rows)], **options}
        self.watch = Watch(self.accelerator, self.model, self.optimizer, **settings)

    def run(self, batches=None):
        accelerator = self.accelerator
        for x, y in self.loader if batches is None else batches:
            with accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(x), y)
                accelerator.backward(loss)
                self.watch.step(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize(("accumulation", "precision"), [(1, "no"), (5, "no"), (2, "bf16")])
def test_the_numbers_of_a_plain_loop(accumulation, precision) -> None:
    """5 does not divide the 12 batches of the epoch: its last step is shorter."""
    training = Training(accumulation, precision=precision)
    training.run()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    wanted = plain(model, loader(), accumulation, optimizer, autocast=precision == "bf16")
    require_same(training.rows, wanted)
    for one, other in zip(training.plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_batch_size_changes_and_the_learning_rate_with_it() -> None:
    """3 batches a step from step 4 on: 6 is the first number of batches that 2 and 3 divide."""
    training = Training(2, schedule=GROWING)
    training.run()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    require_same(training.rows, plain(model, loader(), 2, optimizer, change={3: 3}))
    for one, other in zip(training.plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert training.accelerator.gradient_accumulation_steps == 3
    assert [(c.step, c.batch_size) for c in training.watch.run.follower.changes] == [(3, 24)]


def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path) -> None:
    batches = list(loader())
    whole = Training(2, schedule=GROWING)
    whole.run(batches[:9])  # 4 steps, the last of 3 batches
    whole.accelerator.save_state(str(tmp_path))
    whole.run(batches[9:])
    again = Training(2, schedule=GROWING)
    again.accelerator.load_state(str(tmp_path))
    again.run(batches[9:])
    assert len(whole.rows) == 5
    require_same(again.rows, whole.rows[4:])
    found, wanted = again.watch.state_dict(), whole.watch.state_dict()
    assert found["monitor"] == wanted["monitor"]
    assert found["schedule"] == wanted["schedule"]


def test_trackers_get_the_numbers() -> None:
    tracker = Kept()
    training = Training(1, tracker, log_every=5, prefix="noise/")
    training.run()
    training.watch.close()
    assert [step for step, _ in tracker.seen] == [1, 5, 10, 12]
    noise = training.watch.monitor.noise_scale()
    assert tracker.seen[-1][1]["noise/tr_sigma"] == noise.tr_sigma
    assert json.dumps(tracker.seen, allow_nan=False)
    assert not hasattr(training.plain, "_gradstats_entry")


def test_an_unknown_micro_batch_size_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"pass Schedule\(micro_batch_size=...\)"):
        Training(1, schedule=Schedule(SIZES))
