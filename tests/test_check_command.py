"""`gradstats check module:factory`: what it prints and how it exits."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(command_line):
    return partial(command_line, "check")


def test_command_line(run) -> None:
    code, out, err = run("check_factories:exact")
    assert (code, err) == (0, "")
    assert "All 4 trainable parameters are measured" in out
    code, out, _ = run("check_factories:mixing", "--json")
    report = json.loads(out)
    assert (code, report["ok"], report["mixing"]) == (1, False, "1")
    code, out, _ = run("check_factories:mixing")
    assert code == 1
    assert "BatchNorm1d) lets samples influence each other" in out


@pytest.mark.parametrize("name", ["tensors", "dataset", "loader", "whole"])
def test_what_the_other_commands_take_is_checked_too(run, name: str) -> None:
    code, out, err = run(f"workloads:{name}", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"] is True


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("check_factories", "not of the form module:factory"),
        ("no_such_module:f", "'no_such_module' cannot be imported (ModuleNotFoundError"),
        ("check_factories:absent", "'absent' in module 'check_factories' is not there"),
        ("check_factories:number", "is a int"),
        ("check_factories:pair", "must return (model, loss_fn, batch), not a tuple of 2"),
        ("check_factories:swapped", "returned (tuple, function, Sequential)"),
        ("check_factories:needs_arguments", "called without arguments"),
        ("check_factories:bad_loss", "loss_fn(model, batch) failed"),
    ],
)
def test_command_line_usage_errors_exit_with_two(run, target: str, message: str) -> None:
    code, out, err = run(target)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
