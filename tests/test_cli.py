"""The command line: `doctor`, exit codes, and packages that are not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradstats import backends, doctor
from gradstats.extras import extras

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(command_line, monkeypatch):
    monkeypatch.delenv("GRADSTATS_BACKEND", raising=False)
    backends._resolve.cache_clear()  # what one test pretends must not outlive it
    yield command_line
    backends._resolve.cache_clear()


def in_new_process(code, **env):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_doctor_reports_as_json(run):
    code, out, err = run("doctor", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["ok"] is True
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert report["backends"]["reference"]["runs"] is True
    assert set(report["chosen"]["cpu"]) == set(doctor.OPERATIONS)
    for choice in report["chosen"]["cpu"].values():
        assert choice["backend"] in backends.NAMES
        assert choice["why"]
    assert report["versions"]["torch"]


def test_doctor_speaks_to_people(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for word in ("torch", "Backends", "reference", "triton", "multi_sq_norm"):
        assert word in out


def test_doctor_says_what_limits_the_machine_and_which_extras_are_there(run, monkeypatch):
    _, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert {"cli", "demo"} <= {extra["name"] for extra in report["extras"]}
    assert not {"test", "lint"} & {extra["name"] for extra in report["extras"]}
    _, out, _ = run("doctor")
    assert "This machine: " in out
    assert "rich" in out


REQUIRED = [
    "torch>=2.9", 'rich>=1; extra == "cli"', 'gradstats[cli]; extra == "all"', 'rich>=999; extra == "new"',
    'no-such-package>=2; extra == "all"', 'winonly; sys_platform == "win95" and extra == "all"',
    'pytest>=8; extra == "test"',
]  # fmt: skip


def test_extras_are_read_from_the_metadata():
    cli, every, new = extras(REQUIRED)
    assert (cli.name, cli.unmet) == ("cli", ())
    assert cli.installed["rich"]
    assert every.installed.keys() == {"rich", "no-such-package"}
    assert every.unmet == ("no-such-package>=2",)
    assert every.fix == "pip install 'gradstats[all]'"
    assert (new.unmet, new.to_dict()["complete"]) == (("rich>=999",), False)


def test_doctor_names_the_line_that_installs_an_extra(run, monkeypatch):
    monkeypatch.setattr(doctor, "extras", lambda: extras(REQUIRED))
    monkeypatch.setenv("COLUMNS", "160")
    _, out, _ = run("doctor")
    assert "pip install 'gradstats[all]'" in out
    assert "no-such-package none" in out
    assert "too old or new: rich>=999 is needed" in out


@pytest.mark.parametrize("name", ["transformers", "prometheus"])
def test_the_line_that_installs_is_whole_in_a_narrow_terminal(run, monkeypatch, name):
    needs = [f'{name}-with-a-name>=5; extra == "{name}"', f'rich; extra == "{name}"']
    monkeypatch.setattr(doctor, "extras", lambda: extras(needs))
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("doctor")
    assert f"pip install 'gradstats[{name}]'" in out


def test_doctor_names_the_line_that_builds_the_extension(run, monkeypatch):
    monkeypatch.setattr(backends, "extension", lambda: (None, "no extension; build it"))
    code, out, _ = run("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert {"what": "no extension", "fix": doctor.build_line()} in report["missing"]
    assert report["chosen"]["cpu"]["linear_stats"]["why"] == "not cpu: no extension"


def test_doctor_says_when_the_extension_is_for_another_torch(run, monkeypatch):
    class Module:
        build_info = {"torch": "1.0.0", "cpu_capability": "AVX2", "cuda": False}  # noqa: RUF012

    monkeypatch.setattr(backends, "extension", lambda: (Module, "built"))
    code, out, _ = run("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert "built for torch 1.0.0" in report["missing"][0]["what"]
    # It has no operations, which only running one can tell.
    assert report["backends"]["cpu"]["runs"] is False
    assert "linear_stats failed" in report["backends"]["cpu"]["why"]


@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_doctor_fails_where_a_backend_asked_for_cannot_run(run, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("GRADSTATS_BACKEND", name)
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 1
    assert report["ok"] is False
    assert name in report["error"]
    code, out, _ = run("doctor")
    assert code == 1
    assert name in out


def test_doctor_says_when_a_backend_was_asked_for(run, monkeypatch):
    monkeypatch.setenv("GRADSTATS_BACKEND", "reference")
    code, out, _ = run("doctor", "--json")
    choice = json.loads(out)["chosen"]["cpu"]["linear_stats"]
    assert code == 0
    assert choice == {"backend": "reference", "why": "asked for by GRADSTATS_BACKEND"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--task", "poetry"], "text or digits"),
        (["--out", "/dev/null/run"], "/dev/null/run"),
    ],
)
def test_arguments_that_cannot_be_used_are_named_in_one_line(run, args, words):
    code, out, err = run("demo", *args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "args", "remedy"),
    [
        ("typer", ["doctor"], "pip install 'gradstats[cli]'"),
        ("rich", ["doctor"], "pip install 'gradstats[cli]'"),
        ("matplotlib", ["demo"], "pip install 'gradstats[demo]'"),
        ("sklearn", ["demo", "--task", "digits"], "pip install 'gradstats[demo]'"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(module, args, remedy):
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['gradstats', *{args!r}]\n"
        "from gradstats.cli import main; main()"
    )
    done = in_new_process(code)
    assert done.returncode == 1
    assert done.stdout == ""
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1


def test_python_dash_m_reaches_the_command_line_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['gradstats', 'demo', '--steps', '0']\n"
        "try:\n    runpy.run_module('gradstats', run_name='__main__')\n"
        "except SystemExit as e:\n    print(e.code, 'torch' in sys.modules)"
    )
    assert in_new_process(code).stdout == "2 False\n"
