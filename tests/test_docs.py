"""The documentation: every example in Python runs, every link leads somewhere, figures are those measured."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest
from doc_blocks import LANGUAGES, PAGES, ROOT, blocks, name
from doc_commands import why_not
from doc_pages import common, prelude

import gradstats

if sys.version_info >= (3, 11):
    import tomllib

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = ROOT / "docs"
PAGE = {name(page): blocks(page) for page in PAGES}
PYTHON = {page: [b for b in found if b.language == "python"] for page, found in PAGE.items()}
SHELL = [b for found in PAGE.values() for b in found if b.language == "sh" and not b.why_not]
LINES = {shlex.join(words) for block in SHELL for words in block.commands()}
NOT_RUN_LINES = sorted(line for line in LINES if why_not(line) is not None)
# Blocks that cannot run in a test: their pages, each as often as it has one. Each says why itself.
NOT_RUN: list[str] = []


def test_every_block_is_run_or_says_why_not() -> None:
    every = [b for found in PAGE.values() for b in found]
    assert [b.place for b in every if b.language not in LANGUAGES] == []
    assert sorted(name(b.page) for b in every if b.why_not) == sorted(NOT_RUN)
    fences = {page: (ROOT / page).read_text("utf-8").count("```") for page in PAGE}
    assert fences == {page: 2 * len(found) for page, found in PAGE.items()}  # none was overlooked


@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found])
def test_examples_in_python_run(page: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)  # for examples/
    names = common(tmp_path)
    run = prelude(page, names, lambda: capsys.readouterr().out)
    for block in PYTHON[page]:
        if block.why_not:
            continue
        next(run)
        block.run(names)
    with pytest.raises(StopIteration):  # as many yields as examples, and what follows the last
        next(run)


# ---- shell lines, of which the others are run by test_doc_commands --------------------------------


def options_of(script: Path) -> set[str]:
    """The options that a script's text, or that of its neighbours, has."""
    texts = [script.read_text("utf-8"), *(p.read_text("utf-8") for p in script.parent.glob("*.py"))]
    return {option for text in texts for option in re.findall(r'"(--[a-z-]+)"', text)}


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    unknown = {w for w in words if w.startswith("--")} - options_of(script)
    assert not unknown, f"{words[0]} has no {unknown}"


def check_install(words: list[str]) -> None:
    extras = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    for named in re.findall(r"\[([a-z,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras), f"there is no extra {named}"


def check_make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.M), words


@pytest.mark.parametrize("line", NOT_RUN_LINES)
def test_lines_that_are_not_run_name_what_exists(line: str) -> None:
    match shlex.split(line):
        case ["python", *rest]:
            check_script(rest)
        case ["make", *rest]:
            check_make(rest)
        case ["pip", "install", *rest]:
            check_install(rest)


@pytest.mark.parametrize("language", ["json", "toml"])
def test_data_is_well_formed(language: str) -> None:
    found = [b for page in PAGE.values() for b in page if b.language == language]
    for block in found:
        if language == "json":
            json.loads(block.code)
        elif sys.version_info >= (3, 11):
            tomllib.loads(block.code)


# ---- pages ---------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as mkdocs and GitHub both make them of ASCII words."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = [
        re.sub(r"[^\w\s-]", "", h).strip().lower() for h in re.findall(r"^#+ (.*)", text, re.M)
    ]
    return {re.sub(r"[-\s]+", "-", head) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), f"{name(page)} links to {target}, which is not there"
        if DOCS in page.parents:  # the site holds nothing else
            assert DOCS in found.parents, f"{name(page)} links to {target}, outside of docs/"
        if anchor:
            assert anchor in anchors(found), f"{name(page)} links to {target}, no heading there"


def test_the_navigation_holds_every_page_once() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = config[config.index("\nnav:") : config.index("\nplugins:")]
    pages = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    assert sorted(pages) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_the_reference_names_what_exists() -> None:
    for dotted in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE):
        found = pkgutil.resolve_name(dotted)
        assert found.__doc__, f"{dotted} has no docstring"


def test_the_reference_is_of_everything_public() -> None:
    named = re.findall(r"^::: gradstats\.(\w+)", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    errors = {n for n in gradstats.__all__ if n.endswith("Error")}  # on the page as a module
    assert set(gradstats.__all__) - errors <= set(named)


# ---- figures -------------------------------------------------------------------------------------


def test_the_race_on_the_page_is_the_one_in_the_results() -> None:
    results = ROOT / "bench" / "results" / "time_to_target_cpu.json"
    methods = json.loads(results.read_text("utf-8"))["races"]["digits"]["methods"]
    page = (DOCS / "steps.md").read_text("utf-8")

    def mean(method: dict, of: str, digits: int) -> str:
        return f"{method[of]['mean']:,.{digits}f} ± {method[of]['half_width']:,.{digits}f}"

    for called, race in methods.items():
        if called.startswith("fixed "):
            row = [called.split()[1], f"{race['rate']:.3g}", mean(race, "samples", 0)]
            row += [mean(race, "steps", 0), mean(race, "seconds", 2)]
            assert f"| {' | '.join(row)} |" in page


def test_the_sweep_on_the_page_is_the_one_in_the_results() -> None:
    results = json.loads((ROOT / "bench" / "results" / "sweep_digits.json").read_text("utf-8"))
    page = " ".join((DOCS / "steps.md").read_text("utf-8").split())
    plans = {plan["batch_size"]: plan for plan in results["summary"]}
    held_out = [plan["validation_loss"]["mean"] for plan in plans.values()]
    gaps = [plan["gap"] for plan in (plans[16], plans[256])]
    spread = [f"{g['mean']:.2f} ± {g['high'] - g['mean']:.2f}" for g in gaps]
    variance, target = results["variance"], results["steps_to_target"]
    power = "{exponent:.3f} (90% interval {low:.3f} to {high:.3f})".format(**variance)
    for said in (
        f"held-out images**: {min(held_out):.2f} to {max(held_out):.2f}",
        f"({plans[16]['final_loss']['mean']:.3f} against {plans[256]['final_loss']['mean']:.3f} with",
        f"{spread[0]} with 16, {spread[1]} with 256",
        f"power {power}".replace("-", "−"),
        f"loss of {target['target']:.2f}** lie on (S/S_min − 1)(E/E_min − 1) = 1 to "
        f"{100 * target['worst_relative']:.1f}%, with a critical batch of {target['critical_batch']:.0f}",
    ):
        assert said in page


def results_of(file: str) -> dict:
    return json.loads((ROOT / "bench" / "results" / file).read_text("utf-8"))


def test_costs_are_those_in_the_results() -> None:
    ours = results_of("step_overhead_cpu_no_peers.json")["models"]
    peers = results_of("step_overhead_cpu.json")["models"]
    columns = ("gradstats", "opacus ghost", "opacus hooks", "backpack", "torch.func")

    def cell(rows: dict, tool: str) -> str:
        ratios = [rows[f"{tool} {kind}"].get("ratio") for kind in ("norms", "norms+moments")]
        shown = [
            "–" if r is None else f"{r['median']:.{0 if r['median'] > 10 else 2}f}" for r in ratios
        ]
        return " / ".join(shown)

    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .*B \d+ \|.*$", readme, re.MULTILINE)
    for model, row in zip(("mlp", "cnn", "gpt", "resnet", "vit"), rows, strict=True):
        shown = [re.sub(r"[¹²³ ]+$", "", part).strip() for part in row.strip("| ").split("|")[1:]]
        wanted = [cell(ours[model], "gradstats")]
        wanted += [cell(peers[model], tool) for tool in columns[1:]] if model in peers else []
        assert shown[: len(wanted)] == wanted, model
        assert row in (DOCS / "costs.md").read_text("utf-8")


def test_growth_is_as_in_the_results() -> None:
    found: dict[str, list[str]] = {}
    curves = results_of("growth_cpu.json")["curves"]
    for axis in "BT":
        for curve in curves:
            if curve["axis"] == axis:
                found.setdefault(curve["op"], []).append(f"{curve['line']['farthest']:.0%}")
    notes = (ROOT / "bench" / "NOTES.md").read_text("utf-8")
    rows = notes.split("### Growth\n")[1].split("\n## ")[0]
    for row in found.values():
        assert f"| {' | '.join(row)} |" in rows
    page = " ".join((DOCS / "costs.md").read_text("utf-8").split())

    def farthest(ops: tuple[str, ...], ours: bool) -> str:
        off = [
            curve["line"]["farthest"]
            for curve in curves
            if curve["op"] in ops and (curve["kind"] != "torch") == ours
        ]
        return f"{max(off):.0%}"

    products, memory = ("linear", "conv"), ("layer_norm", "embedding")
    assert f"lie within {farthest(products, True)} of a line" in page
    assert f"within {farthest(memory, True)} (torch's own" in page
    assert f"gradients of these {farthest(memory, False)})" in page


def test_the_counts_of_situations_are_those_in_the_results() -> None:
    situations = results_of("conformance.json")["situations"].values()
    columns = ("gradstats", "opacus hooks", "opacus ghost", "BackPACK", "torch.func")
    verdicts = [[each["cells"][tool]["verdict"] for each in situations] for tool in columns]
    counts = [[of.count(v) for v in ("exact", "refused", "wrong")] for of in verdicts]
    last = f"| exact / refused / wrong, of {len(verdicts[0])} | "
    readme = (ROOT / "README.md").read_text("utf-8")
    assert last + " | ".join(" / ".join(map(str, of)) for of in counts) + " |" in readme
    said = "{} exact, {} refused, none wrong".format(*counts[0])
    assert f"{len(verdicts[0])} situations: {said}" in readme
    assert counts[0][2] == 0


def test_the_steps_that_estimators_need_are_those_in_the_results() -> None:
    page = (DOCS / "noise.md").read_text("utf-8").replace("\\|", "|")
    results = results_of("estimators.json")
    limit = f"> {0.9 * results['steps']:,.0f}"
    for way, needed in results["steps_needed"].items():
        row = [way, *(limit if n is None else f"{n:,}" for n in needed.values())]
        assert f"| {' | '.join(row)} |" in page


def test_the_biases_on_the_page_are_those_in_the_results_and_chance() -> None:
    page = (DOCS / "noise.md").read_text("utf-8").replace("\\|", "|")
    results = results_of("estimators_closed_form.json")
    for row in results["summary"]:
        assert f"| {' | '.join(row)} |" in page
    for found in results["settings"].values():
        for way, figures in found.items():
            ratio = figures["noise_scale"]
            assert abs(ratio["value"]["bias"]) < 1, way
            columns = figures["tr_sigma"], figures["true_grad_sq_norm"], ratio["unbiased"]
            for column in columns:
                assert abs(column["bias"]) < min(1, 3 * column["error"]), (way, column)
            shares = [c["share"] for c in figures["coverage"].values() if c["runs"] > 100]
            assert 0.85 < min(shares) <= max(shares) < 0.97, way
    for windows in ("12", "30"):
        for of in ("noise_scale", "max_learning_rate"):
            figures = results["curvature"][windows][of]
            assert abs(figures["unbiased"]["bias"]) < 1, (windows, of)
            assert 0.85 < figures["share"] < 0.97, (windows, of)


def test_the_races_are_those_in_the_results() -> None:
    page = (DOCS / "training.md").read_text("utf-8")
    for race, found in results_of("time_to_target_cpu.json")["races"].items():
        methods = found["methods"]
        fixed = {m: r["seconds"]["mean"] for m, r in methods.items() if m.startswith("fixed")}
        best = min(fixed, key=lambda method: fixed[method])
        for method in (best, f"fixed {found['base']}", "noise scale", "noise scale × time"):
            figures = [
                f"{methods[method][of]['mean']:,.{digits}f} ± {methods[method][of]['half_width']:,.{digits}f}"
                for of, digits in (("samples", 0), ("steps", 0), ("seconds", 2))
            ]
            over = methods[method]["seconds"]["mean"] / fixed[best]
            called = f"{method}, the fastest fixed one" if method == best else method
            sizes = f"{methods[method]['first_batch']} → {methods[method]['last_batch']:.0f}"
            assert f"| {race} | {called} | {sizes} | {' | '.join(figures)} | {over:.2f} |" in page
