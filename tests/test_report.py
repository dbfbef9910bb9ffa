"""The report as data and as text: verdicts, sections, sizes, escaping."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import report_files as files

from gradstats import recommend
from gradstats.estimators import NoiseScale
from gradstats.workbench import report
from gradstats.workbench.report.drawing import draw
from gradstats.workbench.report.figures import Figure, Table


def made(*paths):
    return report.build(report.read(list(paths)))


@pytest.fixture
def everything(tmp_path):
    logs = [
        files.log(tmp_path / f"batch-{size}.jsonl", batch_size=size, seed=size, every=640 // size)
        for size in (32, 128)
    ]
    return [*logs, *(files.result(tmp_path, kind) for kind in files.RESULTS)]


# ---- the verdict -------------------------------------------------------------------------------


def test_a_log_is_advised_on_as_its_noise_scale_would_be(tmp_path) -> None:
    verdict = made(files.log(tmp_path / "run.jsonl")).verdict
    noise = NoiseScale(400.0, 280.0, 640.0, 0.9, 38_400, 1200, 0, 1.0, 1.0)
    advice = recommend(noise, batch_size=32)
    assert verdict.headline.startswith(f"Change the batch size from 32 to {advice.batch_size:,}: ")
    assert verdict.level == "good"
    facts = {fact.name: fact for fact in verdict.facts}
    assert facts["Noise scale"].value == "400"
    assert facts["Noise scale"].detail == "90% interval 280 to 640"
    # SGD by the noise rule, Adam by the square root.
    ratio = advice.batch_size / 32
    sgd = (1 + 400 / 32) / (1 + 400 / advice.batch_size)
    assert facts["Learning rate"].value == f"× {sgd:.3g}"
    assert facts["Learning rate"].detail.startswith(f"for SGD; × {math.sqrt(ratio):.3g} for Adam")


def test_a_batch_that_suits_is_kept(tmp_path) -> None:
    verdict = made(files.log(tmp_path / "run.jsonl", batch_size=384)).verdict
    assert verdict.headline == "Keep the batch size of 384."


@pytest.mark.parametrize(("low", "high"), [(10.0, None), (10.0, 900.0), (0.0, None)])
def test_a_wide_interval_decides_nothing(tmp_path, low, high) -> None:
    rows = files.rows()
    rows[-1] |= {"noise_scale_low": low, "noise_scale_high": high}
    found = made(files.log(tmp_path / "run.jsonl", rows))
    assert found.verdict.headline.startswith("Keep the batch size of 32 for now")
    assert found.verdict.level == "poor"
    assert any("too wide to act on" in remark.text for remark in found.remarks)


def test_an_unbounded_noise_scale_is_told_from_an_unknown_one(tmp_path) -> None:
    for square, word in ((-1.0, "not bounded"), (None, "unknown")):
        rows = files.rows()
        rows[-1] |= dict.fromkeys(("noise_scale", "noise_scale_high", "noise_scale_low"))
        rows[-1]["true_grad_sq_norm"] = square
        verdict = made(files.log(tmp_path / "run.jsonl", rows)).verdict
        assert verdict.facts[1].value == word


def test_the_memory_cap_splits_the_batch(tmp_path) -> None:
    paths = files.log(tmp_path / "run.jsonl"), files.result(tmp_path, "vram")
    facts = {fact.name: fact for fact in made(*paths).verdict.facts}
    micro, pieces = map(int, facts["Micro-batches"].value.split(" × "))
    assert micro <= 96
    assert facts["Batch size"].value == f"32 → {micro * pieces:,}"


def test_a_measurement_and_its_own_log_count_once(tmp_path) -> None:
    path = files.log(tmp_path / "measure.jsonl")
    found = made(path, files.result(tmp_path, "measure"))
    (trade,) = (section for section in found.sections if section.id == "trade")
    assert len([part for part in trade.parts if isinstance(part, Figure)]) == 1
    assert not found.verdict.headline.startswith("By ")


def test_the_strongest_evidence_comes_first(everything) -> None:
    log, _, measure, *_ = everything
    assert made(*everything).verdict.headline == (
        "Train with batches of 256 instead of 32, a learning rate of 0.08 and 4,000 steps."
    )
    verdict = made(log, measure).verdict
    assert verdict.headline == (
        "Change the batch size from 32 to 256 and the learning rate to 0.11: 81% fewer "
        "steps, 52% more samples, 60% less time to the same loss."
    )


@pytest.mark.parametrize(
    ("kind", "headline"),
    [
        (
            "vram",
            "Micro-batches of 96 fit the memory of a GPU of 24 GB.",
        ),
        (
            "lr_range",
            "Use a learning rate of about 0.0267 at a batch size of 16, 0.0533 at a batch size of 64 and "
            "0.107 at a batch size of 256.",
        ),
        (
            "sweep",
            "Of the plans tried, the best is 16x2000 by samples and 256x125 or 64x500 by time.",
        ),
        ("critical", "Batches of up to 128 lose nothing over equal samples (critical batch size)."),
        (
            "bench",
            "A step measured exactly takes 1.05 × (mlp) the plain step's time on this machine.",
        ),
    ],
)
def test_each_result_alone_has_a_verdict(tmp_path, kind, headline) -> None:
    assert made(files.result(tmp_path, kind)).verdict.headline == headline


def test_memory_that_limits_nothing_promises_no_size(tmp_path) -> None:
    def cells(**changes) -> list[str]:
        return _texts(made(files.result(tmp_path, "vram", **changes)))

    assert {"112", "128, of which 128"} <= set(cells())
    said = cells(beyond=64)
    assert said.count("more than 64, not limited by memory") == 2
    assert not {"112", "128, of which 128"} & set(said)


def _texts(page) -> list[str]:
    tables = [part for s in page.sections for part in s.parts if isinstance(part, Table)]
    return [cell for table in tables for row in table.rows for cell in row]


def test_a_sweep_that_was_cut_short_is_shown_without_a_verdict(tmp_path) -> None:
    trials = [files.trial(16, 200, 0, 0.3), {**files.trial(64, 50, 0, 0.3), "final_loss": None}]
    trials[1] |= {"ok": False, "validation_loss": None, "curve": []}
    changes = {"trials": trials, "summary": [], "verdicts": [], "variance": None}
    found = made(files.result(tmp_path, "sweep", **changes, steps_to_target=None, interrupted=True))
    assert found.verdict.level == "poor"
    assert any("interrupted" in remark.text for remark in found.remarks)
    (map_,) = (p for p in found.sections[0].parts if isinstance(p, Table))
    assert [row[-1] if isinstance(row[-1], str) else row[-1].text for row in map_.rows] == [
        *("0.35", "failed"),
    ]


def test_the_curve_of_a_plan_is_the_mean_of_its_trials(tmp_path) -> None:
    trials = [files.trial(16, 400, seed, 0.3 + 0.1 * seed) for seed in range(3)]
    found = made(files.result(tmp_path, "sweep", trials=trials))
    (line,) = next(
        p for p in found.sections[0].parts if p.title == "Validation loss by samples"
    ).lines
    expected = [0.45 + 2 * math.exp(-k / 6) for k in range(1, 41)]
    np.testing.assert_allclose(line.y, expected, rtol=1e-6)
    np.testing.assert_allclose(line.high - line.low, 0.2, rtol=1e-6)


def test_two_trainings_are_compared_where_the_shorter_ends(tmp_path) -> None:
    one = files.log(tmp_path / "long.jsonl", [dict(row, loss=2.0) for row in files.rows(100)])
    short_rows = [dict(row, loss=1.0) for row in files.rows(50)]
    other = files.log(tmp_path / "short.jsonl", short_rows)
    reasons = made(one, other).verdict.reasons
    assert "At 16,000 samples the smoothed losses were: short 1, long 2" in reasons
    assert "After 25 s the smoothed losses were: short 1, long 2" in reasons


# ---- sections and remarks ----------------------------------------------------------------------


def titles(found):
    return [f.title for section in found.sections for f in section.parts if isinstance(f, Figure)]


def test_sections_are_those_with_data(tmp_path, everything) -> None:
    log = made(files.log(tmp_path / "run.jsonl"))
    assert [section.id for section in log.sections] == [
        *("noise", "trade", "loss", "runs", "layers", "schedule", "speed"),
    ]
    all_of_them = [section.id for section in made(*everything).sections]
    assert all_of_them[0] == "plan"
    for name in ("sweep", "critical", "lr-range", "memory", "bench", "environment"):
        assert name in all_of_them
    plain = made(files.log(tmp_path / "plain.jsonl", [{"step": 1, "loss": 2.0, "accuracy": 0.5}]))
    assert {"noise", "trade", "layers"}.isdisjoint(section.id for section in plain.sections)
    assert any("no noise scale" in remark.text for remark in plain.remarks)
    assert titles(plain) == ["Loss by steps"]


def test_every_figure_says_how_to_read_it(everything) -> None:
    found = made(*everything)
    figures = [f for section in found.sections for f in section.parts if isinstance(f, Figure)]
    assert len(figures) >= 18
    for figure in figures:
        assert len(figure.caption) > 20
        assert figure.x.label
        assert figure.y.label
        drawing = draw(figure)
        assert figure.title in drawing.alternative
        assert len(drawing.x_ticks) >= 2, figure.title
        assert len(drawing.y_ticks) >= 2, figure.title


def test_validation_loss_and_other_numbers_are_shown(tmp_path) -> None:
    path = files.log(tmp_path / "run.jsonl", validation_loss=0.7, accuracy=0.9)
    found = made(path)
    (loss,) = (section for section in found.sections if section.id == "loss")
    assert [line.style for line in loss.parts[0].lines] == ["faint", "line", "dashed"]
    assert "accuracy" in titles(found)


def test_remarks(tmp_path) -> None:
    rows = files.rows(num_skipped=40, coverage=0.8)
    rows[5]["loss"] = None
    text = " ".join(remark.text for remark in made(files.log(tmp_path / "run.jsonl", rows)).remarks)
    assert "40 of 1,200 steps were left out of the noise scale" in text
    assert "80% of the trainable parameters were measured" in text
    assert "the loss is not finite in 1 of 120 rows" in text
    (uncovered,) = made(files.result(tmp_path, "measure")).remarks
    assert "98% of the trainable parameters" in uncovered.text
    assert "emb.weight (sparse gradients)" in uncovered.text


# ---- the page ----------------------------------------------------------------------------------


def test_nothing_in_the_files_becomes_markup(tmp_path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    rows = [{**row, f"layer_share/{evil}": 0.5, evil: 1.0} for row in files.rows(5)]
    paths = [files.log(tmp_path / "<b>run.jsonl", rows)]
    layers = [{"name": evil, "share": 0.5, "noise_scale": None}]
    missing = {evil: evil}
    paths.append(files.result(tmp_path, "measure", layers=layers, missing=missing, target=evil))
    paths.append(files.result(tmp_path, "advise", reasons=[evil], remarks=[evil]))
    paths.append(files.result(tmp_path, "vram", device=evil))
    page = report.render(report.build(report.read(paths), title=evil))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert page.count("<script") == 2 + len(paths)
    assert page.count("</script") == 2 + len(paths)


def test_the_page_asks_for_nothing(everything) -> None:
    page = report.render(made(*everything))
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", page)
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


def test_embedded_data_is_the_files_content(tmp_path) -> None:
    path = files.log(tmp_path / "run.jsonl")
    page = report.render(made(path))
    (text,) = re.findall(r'id="data-0">(.*?)</script>', page, re.DOTALL)
    assert json.loads(text) == files.rows()


def test_long_logs_make_small_pages(tmp_path) -> None:
    row = files.rows(10)[-1]
    with (tmp_path / "long.jsonl").open("w") as file:
        for step in range(1, 100_001):
            row |= {"step": step, "samples": 32 * step, "loss": 1 + 1 / step, "seconds": 0.1 * step}
            file.write(json.dumps(row) + "\n")
    found = made(tmp_path / "long.jsonl")
    page = report.render(found)
    assert len(page.encode()) < 2_000_000
    (remark,) = found.remarks
    assert remark.text.startswith("100,000 rows: figures show about 300 points")
    assert found.data[0].left_out > 90_000
    assert f"{found.data[0].left_out:,}" in page
    (text,) = re.findall(r'id="data-0">(.*?)</script>', page, re.DOTALL)
    kept = json.loads(text)
    assert (kept[0]["step"], kept[-1]["step"]) == (1, 100_000)
    assert len(kept) == 100_000 - found.data[0].left_out
