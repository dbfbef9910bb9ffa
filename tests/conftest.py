"""Fixtures of several test files; helpers beside the tests (`oracle`, `models`) are imported by name."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from threads import num_threads

# Test processes that run side by side share the cores; what needs threads sets their number itself.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# Elsewhere every run draws new examples; a change is judged by the same ones each time.
settings.register_profile("ci", derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_runtest_setup() -> None:
    """The same weights and data in every run, alone or after other tests; few seed for themselves."""
    torch.manual_seed(0)


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs `gradstats` with these arguments: its exit code, standard output and standard error."""
    from gradstats.cli import main

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["gradstats", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def one_thread():
    """Tiny steps gain nothing from threads, and lose much where others use the machine."""
    with num_threads(1):
        yield


@pytest.fixture
def entered(monkeypatch) -> list[str]:
    """The paths of the modules that Python entered."""
    from gradstats import interpose

    paths: list[str] = []
    plain = interpose.Interposer.enter

    def enter(self, module, path, original, args, kwargs):
        paths.append(path)
        return plain(self, module, path, original, args, kwargs)

    monkeypatch.setattr(interpose.Interposer, "enter", enter)
    return paths
