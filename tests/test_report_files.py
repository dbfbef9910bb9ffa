"""What the report reads, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import report_files as files

from gradstats.errors import InvalidArgumentError
from gradstats.workbench import report
from gradstats.workbench.report.inputs import Run


def test_kinds_are_told_apart(tmp_path) -> None:
    paths = [files.log(tmp_path / "run.jsonl")]
    paths += [files.result(tmp_path, kind) for kind in files.RESULTS]
    found = report.read(paths)
    assert [given.kind for given in found] == ["log", *files.RESULTS]
    assert [given.name for given in found] == ["run", *files.RESULTS]
    assert len(found[0].rows) == 120


def test_names_are_as_long_as_they_must_be(tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [files.log(tmp_path / folder / "run.jsonl") for folder in ("a", "b")]
    assert [given.name for given in report.read(paths)] == ["a/run", "b/run"]
    paths = [files.log(tmp_path / "measure.jsonl"), files.result(tmp_path, "measure")]
    assert [given.name for given in report.read(paths)] == ["measure.jsonl", "measure.json"]


def test_corrupt_lines_are_counted(tmp_path) -> None:
    path = files.log(tmp_path / "run.jsonl")
    text = path.read_text().splitlines()
    text[3] = text[3][: len(text[3]) // 2]
    text[7] = "\x00\x00"
    path.write_text("\n".join([*text, '{"step": 12']))
    (given,) = report.read([path])
    assert (given.spoilt, len(given.rows)) == (3, 118)
    (remark,) = report.build([given]).remarks
    assert remark.text.startswith("3 lines hold no row")


def test_what_a_resumed_training_did_again_counts_once(tmp_path) -> None:
    rows = files.rows(10)
    again = [{**row, "loss": 9.0} for row in rows[6:9]]
    path = files.log(tmp_path / "run.jsonl", [*rows[:8], *again])
    (given,) = report.read([path])
    assert given.replaced == 2
    assert [row["step"] for row in given.rows] == [10 * n for n in range(1, 10)]
    assert [row["loss"] == 9.0 for row in given.rows] == [False] * 6 + [True] * 3


def test_columns_are_numbers_or_nan() -> None:
    rows = [
        {"step": 1, "loss": 2},
        {"step": 2, "loss": None},
        {"step": 3, "loss": "x"},
        {"step": 4},
    ]
    run = Run("run", [*rows, {"step": 5, "loss": True}, {"step": 6, "loss": float("inf")}])
    np.testing.assert_array_equal(run.column("loss"), [2, *[np.nan] * 4, np.inf])
    assert run.last("loss") == 2
    assert np.isnan(run.last("absent"))


def cut(path) -> None:
    path.write_text(path.read_text()[:-200])


def empty(path) -> None:
    path.write_text("\n")


def prose(path) -> None:
    path.write_text("epoch 1: loss 2.3\n")


def other_kind(path) -> None:
    path.write_text('{"kind": "gradstats soup", "version": 1}')


def no_curves(path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "curves": "none"}))


def curve_of_text(path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "curves": [5]}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"lr_range.json is not JSON from line \d+ on; was it cut short"),
        (empty, "lr_range.json is empty; has its training made a row yet"),
        (prose, r"lr_range.json is neither a log .*none of its 1 lines is a row"),
        (other_kind, "lr_range.json holds gradstats soup; what is needed"),
        (no_curves, 'lr_range.json has curves = "none", where a list of objects is needed'),
        (curve_of_text, r"lr_range.json has curves = \[5\], where a list"),
        (lambda path: path.unlink(), "lr_range.json cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, spoil, message) -> None:
    path = files.result(tmp_path, "lr_range")
    spoil(path)
    with pytest.raises(InvalidArgumentError, match=message) as error:
        report.read([path])
    assert "\n" not in str(error.value)


def test_nothing_or_twice_the_same_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="no file was given"):
        report.read([])
    path = files.log(tmp_path / "run.jsonl")
    with pytest.raises(InvalidArgumentError, match="was given twice"):
        report.read([path, path])


@pytest.mark.parametrize("kind", files.RESULTS)
def test_results_without_what_is_optional_make_reports(tmp_path, kind) -> None:
    """A measurement that was interrupted early, say: lists are there, and empty."""
    content = {
        key: [] if isinstance(value, list) else None for key, value in files.RESULTS[kind]().items()
    }
    made = report.build(report.read([files.result(tmp_path, kind, **content)]))
    assert made.verdict.level == "poor"
    assert "<html" in report.render(made)


@pytest.mark.parametrize("kind", files.RESULTS)
def test_numbers_that_are_null_make_reports(tmp_path, kind) -> None:
    def without(value):
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items()}
        if isinstance(value, list):
            return [without(part) for part in value]
        return None if isinstance(value, float) else value

    content = without(files.RESULTS[kind]())
    report.render(report.build(report.read([files.result(tmp_path, kind, **content)])))


def refusal(path) -> str:
    """What is said of a file that no report can be made of; empty where one can."""
    try:
        report.render(report.build(report.read([path])))
    except InvalidArgumentError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", files.RESULTS)
@pytest.mark.parametrize("wrong", ["x", [{}], {"a": [1]}, 10**400])
def test_fields_of_the_wrong_kind_are_shown_as_unknown_or_refused(tmp_path, kind, wrong) -> None:
    for key in files.RESULTS[kind]():
        path = files.result(tmp_path, kind, **{key: wrong})
        said = refusal(path)
        assert said == "" or str(path) in said
