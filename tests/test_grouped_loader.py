"""The loader that groups the batches of any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import numbers, taken
from torch.utils.data import DataLoader

import gradstats


def test_grouped_batches_of_any_loader():
    loader = gradstats.GroupedLoader(DataLoader(numbers(11), batch_size=2), accumulation_steps=2)
    sizes, found, weights = [], [], []
    for step in loader:
        sizes.append(step.num_samples)
        for (batch,), weight in step:
            found += batch.tolist()
            weights.append(weight)
        loader.accumulation_steps = 3
    assert found == list(range(11))
    assert sizes == [4, 6, 1]
    assert weights == pytest.approx([1 / 2] * 2 + [1 / 3] * 3 + [1])
    assert loader.batch_size == 6


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 4), st.booleans())
def test_groups_lose_nothing_while_their_count_changes_and_runs_are_resumed(
    data, n, micro, shuffle
):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        generator = torch.Generator().manual_seed(3)
        batches = stateful(numbers(n), batch_size=micro, shuffle=shuffle, generator=generator)
        return gradstats.GroupedLoader(batches)

    loader, found = make(), []
    while loader.epoch < 2:
        for step in loader:
            found += taken(step)
            assert loader.samples == len(found)
            loader.accumulation_steps = data.draw(st.integers(1, 5))
            if data.draw(st.booleans()):
                state, loader = loader.state_dict(), make()
                loader.load_state_dict(state)
                break
    assert sorted(found) == sorted([*range(n)] * 2)
    assert sorted(found[:n]) == list(range(n))


def test_a_stateful_data_loader_is_resumed_within_an_epoch():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        return gradstats.GroupedLoader(
            stateful(numbers(30), batch_size=2, shuffle=True, num_workers=1), accumulation_steps=2
        )

    torch.manual_seed(0)
    loader, found = make(), []
    for number, step in enumerate(loader):
        found += taken(step)
        loader.accumulation_steps = 3
        if number == 2:
            state = loader.state_dict()
            break
    fresh = make()
    fresh.load_state_dict(state)
    assert fresh.accumulation_steps == 3
    found += [i for step in fresh for i in taken(step)]
    assert sorted(found) == list(range(30))


def test_what_a_grouped_loader_cannot_know():
    with pytest.raises(gradstats.InvalidArgumentError, match="pass micro_batch_size="):
        gradstats.GroupedLoader([torch.arange(3)])
    with pytest.raises(gradstats.InvalidArgumentError, match="StatefulDataLoader"):
        gradstats.GroupedLoader(DataLoader(numbers(4), batch_size=2)).state_dict()
