"""The loader of optimizer steps: every sample of an epoch once, whatever changes meanwhile."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numbered import numbers, taken
from torch import nn
from torch.utils.data import TensorDataset

import gradstats

# --- one process and several ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 90),
    world=st.integers(1, 4),
    micro=st.integers(1, 5),
    full=st.booleans(),
    data=st.data(),
)
def test_every_sample_once_while_everything_changes(n, world, micro, full, data):
    """Accumulation, micro-batch size, ranks and process change at random; steps are left early."""
    assume(n >= world)
    micro = min(micro, n // world)

    def make(world, micro):
        return [
            gradstats.StepLoader(
                numbers(n), micro_batch_size=micro, batch_size=micro * world, seed=5, full=full,
                rank=rank, world_size=world,
            )
            for rank in range(world)
        ]  # fmt: skip

    loaders = make(world, micro)
    seen: Counter[int] = Counter()
    for _ in range(2 * n + 8):
        if loaders[0].epoch == 3:
            break
        steps = [next(iter(loader), None) for loader in loaders]
        assert len({step is None for step in steps}) == 1
        if steps[0] is None:
            assert len({loader.epoch for loader in loaders}) == 1
            continue
        assert len({(s.num_samples, len(s)) for s in steps}) == 1
        found = [taken(step) for step in steps]
        assert sum(map(len, found)) == steps[0].num_samples
        seen.update(i for part in found for i in part)
        change = data.draw(st.sampled_from(["none", "accumulation", "micro", "restart", "ranks"]))
        if change == "accumulation":
            number = data.draw(st.integers(1, 6))
            for loader in loaders:
                loader.accumulation_steps = number
        elif change == "micro":
            micro = data.draw(st.integers(1, max(1, n // world)))
            for loader in loaders:
                loader.micro_batch_size = micro
        elif change in ("restart", "ranks"):
            states = [loader.state_dict() for loader in loaders]
            assert all(state == states[0] for state in states)
            if change == "ranks":
                world = data.draw(st.integers(1, min(4, n)))
                micro = data.draw(st.integers(1, n // world))
            loaders = make(world, micro)
            for loader in loaders:
                loader.load_state_dict(states[0])
    state = loaders[0].state_dict()
    expected = Counter(i for _ in range(state["epoch"]) for i in range(n))
    left = Counter(state["carried"])
    order = loaders[0]._epoch_order()
    expected.update(order[: state["position"]].tolist())
    # Of the epochs that ended everything was seen, but for what the present one begins with.
    expected.subtract(left)
    assert seen == +expected
    if not full and world == 1:
        assert not left


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_workers_prefetch_and_nothing_is_lost(workers, persistent):
    loader = gradstats.StepLoader(
        numbers(50), micro_batch_size=3, batch_size=6, seed=1, num_workers=workers,
        persistent_workers=persistent,
    )  # fmt: skip
    plain = gradstats.StepLoader(numbers(50), micro_batch_size=3, batch_size=6, seed=1)
    for epoch in range(2):
        found = []
        for number, step in enumerate(loader):
            found += taken(step)
            loader.accumulation_steps = 1 + number % 4
            if number == 4 and epoch == 0:
                loader.micro_batch_size = 4
        assert sorted(found) == list(range(50))
        assert loader.epoch == epoch + 1
        assert found == [i for step in plain for i in taken(step)]


def test_a_new_count_holds_from_the_next_step_on():
    loader = gradstats.StepLoader(
        numbers(40), micro_batch_size=2, batch_size=4, num_workers=1, prefetch_factor=4
    )
    steps, sizes = iter(loader), []
    for count in (2, 5, 1, 3):
        loader.accumulation_steps = count
        sizes.append(len(taken(next(steps))))
    assert sizes == [4, 10, 2, 6]
    assert loader.batch_size == 6
    assert sum(len(taken(step)) for step in steps) == 18


@pytest.mark.parametrize("number", range(5))
def test_resumed_anywhere_the_same_samples_come(number):
    def make():
        return gradstats.StepLoader(numbers(23), micro_batch_size=2, batch_size=6, seed=3)

    one, found = make(), []
    while one.epoch < 2:
        found += [taken(step) for step in one]
    other, again = make(), []
    while other.epoch < 2:
        for step in other:
            again.append(taken(step))
            if len(again) % 5 == number:
                state = other.state_dict()
                other = make()
                other.load_state_dict(state)
                break
    assert again == found


def test_a_step_that_was_not_finished_is_begun_again_after_a_restart():
    loader = gradstats.StepLoader(numbers(12), micro_batch_size=2, batch_size=6)
    steps = iter(loader)
    first = taken(next(steps))
    parts = iter(next(steps))
    half = next(parts)[0][0].tolist()
    state = loader.state_dict()
    fresh = gradstats.StepLoader(numbers(12), micro_batch_size=2, batch_size=6)
    fresh.load_state_dict(state)
    again = taken(next(iter(fresh)))
    assert again[:2] == half
    assert (loader.samples, fresh.samples) == (8, 12)
    assert sorted(first + again) == list(range(12))


class Failing(TensorDataset):
    """Cannot give sample 7 the first time."""

    failed = False

    def __getitem__(self, index):
        if index == 7 and not self.failed:
            self.failed = True
            raise OSError("sample 7 cannot be read")
        return super().__getitem__(index)


def test_a_sample_that_cannot_be_read_at_first_is_read_again():
    loader = gradstats.StepLoader(Failing(torch.arange(20)), micro_batch_size=2, batch_size=4)
    found, errors = [], 0
    while loader.epoch == 0:
        try:
            for step in loader:
                for (batch,), _ in step:
                    found += batch.tolist()
        except OSError:
            errors += 1
    assert errors == 1
    assert sorted(found) == list(range(20))


def test_a_step_left_early_loses_nothing():
    loader = gradstats.StepLoader(numbers(12), micro_batch_size=2, batch_size=6)
    found = []
    for step in loader:
        found += next(iter(step))[0][0].tolist()
    assert sorted(found) == list(range(12))


def test_weights_make_the_mean_over_all_samples():
    torch.manual_seed(0)
    x = torch.randn(11, 3, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    world, shards = 2, []
    for rank in range(world):
        loader = gradstats.StepLoader(
            TensorDataset(x), micro_batch_size=2, batch_size=8, rank=rank, world_size=world
        )
        grads = []
        for step in loader:
            model.zero_grad()
            for (part,), weight in step:
                (weight * model(part).square().mean()).backward()
            grads.append(model.weight.grad.clone())
        shards.append(grads)
    order = loader._order
    whole = []
    for first, end in ((0, 8), (8, 11)):
        model.zero_grad()
        model(x[order[first:end]]).square().mean().backward()
        whole.append(model.weight.grad.clone())
    for of_ranks, expected in zip(zip(*shards, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(of_ranks) / world, expected, rtol=1e-12, atol=0)


def test_epochs_differ_seeds_differ_and_no_other_generator_is_drawn_from():
    def epoch(loader):
        return [i for step in loader for i in taken(step)]

    make = partial(
        gradstats.StepLoader, numbers(30), micro_batch_size=5, batch_size=5, num_workers=1
    )
    before = torch.get_rng_state()
    loader = make(seed=1)
    first, second = epoch(loader), epoch(loader)
    assert first != second
    assert first != epoch(make(seed=2))
    assert epoch(make(shuffle=False)) == list(range(30))
    assert torch.equal(before, torch.get_rng_state())


class Noisy(TensorDataset):
    def __getitem__(self, index):
        return torch.rand(())


def test_workers_random_numbers_are_the_same_in_each_run_and_differ_between_ranks():
    def draw(rank):
        loader = gradstats.StepLoader(
            Noisy(torch.arange(8)), micro_batch_size=2, batch_size=4, num_workers=1, rank=rank, world_size=2
        )  # fmt: skip
        return torch.cat([batch for step in loader for batch, _ in step]).tolist()

    assert draw(0) == draw(0)
    assert not set(draw(0)) & set(draw(1))


# --- refused -------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.arange(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 5}, "batch_size=5 cannot be used; pass a multiple of"),
        ({"batch_size": 12}, "the dataset has 10 samples"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"sampler": None}, "StepLoader sets these itself"),
        ({"in_order": False}, "in_order=False"),
        ({"seed": -1}, "seed=-1"),
        ({"dataset": Stream()}, "gradstats.GroupedLoader"),
        ({"dataset": iter([1, 2])}, r"the like \(list_iterator\).*gradstats.GroupedLoader"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    arguments = {"dataset": numbers(10), "micro_batch_size": 2, "batch_size": 4, **change}
    with pytest.raises(gradstats.InvalidArgumentError, match=words):
        gradstats.StepLoader(arguments.pop("dataset"), **arguments)


def test_steps_out_of_turn_are_refused():
    loader = gradstats.StepLoader(numbers(10), micro_batch_size=2, batch_size=4)
    steps = iter(loader)
    first = next(steps)
    with pytest.raises(gradstats.OrderError, match="passed over"):
        next(steps)
    steps = iter(loader)
    second = next(steps)
    with pytest.raises(gradstats.OrderError, match="after the next step began"):
        taken(first)
    assert len(taken(second)) == 4


def test_state_of_another_dataset_is_refused():
    state = gradstats.StepLoader(numbers(10), micro_batch_size=2, batch_size=4).state_dict()
    for other in (numbers(11), 1):
        changes = {"seed": other} if isinstance(other, int) else {}
        dataset = numbers(10) if changes else other
        loader = gradstats.StepLoader(dataset, micro_batch_size=2, batch_size=4, **changes)
        with pytest.raises(gradstats.InvalidArgumentError, match="lost or repeated"):
            loader.load_state_dict(state)
