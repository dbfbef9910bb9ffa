"""Measuring a step leaves no trace, sees its memory, and stays within what fits."""

import hashlib
import pickle
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

import gradstats
from gradstats.errors import InvalidArgumentError
from gradstats.kept import kept


class Everything(nn.Module):
    """Parameters, a buffer of each kind that every forward changes, dropout, a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.unsaved = self.unsaved + 1
        return self.last(self.drop(self.first(x)).tanh())


def training(make_optimizer, dtype=torch.float32):
    """All that a training has, in the middle of it, and its step."""
    torch.manual_seed(0)
    model = Everything().to(dtype)
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    monitor = gradstats.attach(model, optimizer=optimizer)
    generator = torch.Generator().manual_seed(3)

    def step(micro: int, count: int) -> None:
        random.random(), np.random.rand()  # noqa: NPY002
        for _ in range(count):
            model(
                torch.randn(micro, 6, dtype=dtype, generator=generator)
            ).square().mean().backward()
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for _ in range(3):
        step(4, 2)
    model(torch.randn(4, 6, dtype=dtype)).square().mean().backward()
    monitor.step()  # gradients there, and a step that nobody has read
    return (model, optimizer, schedule, monitor, generator), step


def fingerprint(things) -> str:
    model, optimizer, schedule, monitor, generator = things
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    tensors += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    tensors += [torch.get_rng_state(), generator.get_state()]
    plain = [t if t is None else (t.dtype, t.detach().double().numpy().tobytes()) for t in tensors]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    rest = (groups, schedule.state_dict(), monitor.state_dict(), model.drop.training)
    numbers = (random.getstate(), np.random.get_state())  # noqa: NPY002
    return hashlib.sha256(pickle.dumps((plain, repr(rest), numbers))).hexdigest()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.AdamW(p, torch.tensor(0.1), amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adascale": lambda p: gradstats.optim.AdaScale(p, 0.1, base_batch_size=2, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_put_back_to_the_bit(name, dtype):
    things, step = training(OPTIMIZERS[name], dtype)
    before, grads = fingerprint(things), [p.grad for p in things[0].parameters()]
    timing = gradstats.measure_step(step, (2, 4), restore=things, warmup=1, rounds=2)
    assert fingerprint(things) == before
    assert all(p.grad is g for p, g in zip(things[0].parameters(), grads, strict=True))
    assert [(p.micro_batch_size, p.accumulation_steps) for p in timing.points] == [
        (2, 1), (2, 2), (4, 1), (4, 2)
    ]  # fmt: skip
    step(4, 1)
    assert fingerprint(things) != before


def test_the_fingerprint_sees_every_part():
    """Leaving any part out of `restore` shows."""
    for left_out in range(5):
        things, step = training(OPTIMIZERS["momentum"])
        before = fingerprint(things)
        rest = [thing for i, thing in enumerate(things) if i != left_out]
        gradstats.measure_step(step, (2, 4), restore=rest, warmup=1, rounds=1)
        assert fingerprint(things) != before, left_out


def test_everything_is_put_back_after_an_error():
    things, step = training(OPTIMIZERS["adam"])
    before = fingerprint(things)

    def fails(micro: int, count: int) -> None:
        step(micro, count)
        if micro == 4:
            raise ValueError("no memory left")

    with pytest.raises(ValueError, match="no memory left"):
        gradstats.measure_step(fails, (2, 4), restore=things)
    assert fingerprint(things) == before


def test_fresh_optimizer_state_is_removed_again():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())

    def step(micro: int, count: int) -> None:
        model(torch.ones(micro, 3)).sum().backward()
        optimizer.step()

    gradstats.measure_step(step, (1, 2), restore=(optimizer,), accumulation_steps=(1,), rounds=1)
    assert not optimizer.state
    assert model.weight.grad is None


def test_what_cannot_be_kept():
    with pytest.raises(InvalidArgumentError, match=r"state of a list cannot be kept.*state_dict"):
        kept([[1, 2]])


def sleeping(update: float, launch: float, each: float):
    def step(micro: int, count: int) -> None:
        end = time.perf_counter() + update + count * (launch + each * micro)
        while time.perf_counter() < end:  # sleep() oversleeps by more where others use the machine
            pass

    return step


def test_seconds_are_seconds():
    """A step that takes as long as it is told to: other work on the machine can only add."""
    model = nn.Linear(2, 2)
    step = sleeping(4e-3, 2e-3, 1e-4)
    timing = gradstats.measure_step(step, (10, 40), restore=(model,), rounds=5, memory=False)
    for point in timing.points:
        told = 4e-3 + point.accumulation_steps * (2e-3 + 1e-4 * point.micro_batch_size)
        assert point.seconds >= told
    assert timing.device == "cpu"
    assert timing.memory_bytes is None


# --- memory -----------------------------------------------------------------------------------


def holding(each: int):
    """A step that holds `each` bytes per sample at once, twice, and no more than that."""

    def step(micro: int, count: int) -> None:
        for _ in range(count):
            held = torch.empty(each * micro, dtype=torch.uint8)
            del held

    return step


def test_memory_per_sample_on_the_cpu():
    model = nn.Linear(2, 2)
    timing = gradstats.measure_step(holding(4096), (4, 8, 32), restore=(model,), rounds=1)
    assert timing.bytes_per_sample == pytest.approx(4096, rel=0.01)
    assert timing.bytes(16) == pytest.approx(16 * 4096, rel=0.01)


def test_memory_sees_what_operators_hold_and_what_a_step_frees():
    """A matrix product of two temporaries: three matrices at once, one buffer of the caller freed."""
    model, held = nn.Linear(2, 2), [torch.ones(512)]

    def step(micro: int, count: int) -> None:
        held[0] = torch.ones(512)  # the old one goes when the new one is there
        (torch.ones(micro, 1024) @ torch.ones(1024, micro)).sum()

    timing = gradstats.measure_step(
        step, (64, 128), restore=(model,), accumulation_steps=(1,), rounds=1
    )
    peaks = [p.peak_bytes for p in timing.points]
    for m, peak in zip((64, 128), peaks, strict=True):
        assert peak == pytest.approx(4 * (2 * 1024 * m + m * m), rel=0.05)


def test_sizes_that_will_not_fit_are_not_tried():
    tried = set()

    def step(micro: int, count: int) -> None:
        tried.add(micro)
        holding(4096)(micro, count)

    timing = gradstats.measure_step(
        step, (4, 8, 16, 32, 64), restore=(nn.Linear(2, 2),), rounds=1, memory_bytes=20 * 4096
    )
    assert tried == {4, 8, 16}
    assert timing.max_micro_batch_size == 16
    assert timing.memory_bytes == 20 * 4096


def test_fewer_than_two_sizes_that_fit_are_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"only \[4\] fit memory_bytes=20480; pass smaller"
    ):
        gradstats.measure_step(
            holding(4096), (4, 8), restore=(nn.Linear(2, 2),), rounds=1, memory_bytes=5 * 4096
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batch_sizes": (4,)}, "micro_batch_sizes=.*two or more sizes"),
        ({"micro_batch_sizes": (4, 4)}, "micro_batch_sizes=.*two or more sizes"),
        ({"micro_batch_sizes": (0, 4)}, "micro_batch_sizes=0.*at least 1"),
        ({"micro_batch_sizes": (2.5, 4)}, "micro_batch_sizes=2.5.*at least 1"),
        ({"accumulation_steps": ()}, "accumulation_steps=.*one number or more"),
        ({"accumulation_steps": (0,)}, "accumulation_steps=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"memory_bytes": 0}, "memory_bytes=0"),
        ({"restore": ()}, "restore=.*the model and the optimizer"),
    ],
)
def test_bad_arguments(options, words):
    options = {"micro_batch_sizes": (2, 4), "restore": (nn.Linear(2, 2),), **options}
    with pytest.raises(InvalidArgumentError, match=words):
        gradstats.measure_step(lambda m, k: None, **options)
