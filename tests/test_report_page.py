"""The report in a real browser: errors, requests, width, colours, keyboard, download."""

from __future__ import annotations

import re
import time

import pytest
import report_files as files
from chromium import Browser, found

from gradstats.workbench import report

pytestmark = pytest.mark.skipif(found() is None, reason="no Chromium here")

EVIL = '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 2">'
# The least contrast (WCAG 2.2, 1.4.3) of any text with what lies behind it.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  let least = ["", 99], texts = 0;
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.checkVisibility() || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
    texts += 1;
    const [a, b] = [rgb(getComputedStyle(node).color), behind(node)].map(light).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[1]) least = [`${node.tagName}.${node.className}: ${node.textContent}`, ratio];
  }
  return [...least, texts];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two logs and of every kind of result, with names that try to get out."""
    folder = tmp_path_factory.mktemp("report")
    logs = [
        files.log(
            folder / f"batch-{size}.jsonl",
            [
                {**row, EVIL: 1.0}
                for row in files.rows(batch_size=size, every=640 // size, seed=size)
            ],
        )
        for size in (32, 128)
    ]
    layers = [{"name": EVIL, "share": 0.6, "noise_scale": 9.0}, {"name": "w" * 200, "share": 0.4}]
    results = [
        files.result(folder, kind, **({"layers": layers} if kind == "measure" else {}))
        for kind in files.RESULTS
    ]
    path = folder / "report.html"
    made = report.build(report.read([*logs, *results]), title=f"Digits {EVIL}")
    path.write_text(report.render(made), "utf-8")
    return path


def open_at(browser, page, width, scheme) -> None:
    browser.size(width)
    browser.scheme(scheme)
    browser.open(page.as_uri())
    browser.evaluate("localStorage.clear()")
    browser.open(page.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_sound(browser, page, width, scheme) -> None:
    open_at(browser, page, width, scheme)
    assert browser.problems == []
    assert browser.requests == [page.as_uri()]
    assert browser.evaluate("window.hit") is None
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    text, ratio, texts = browser.evaluate(CONTRAST)
    assert texts > 300
    assert ratio >= 4.5, (text, ratio)
    assert browser.problems == []


def test_every_figure_is_drawn_within_its_frame(browser, page) -> None:
    open_at(browser, page, 1280, "light")
    plots = browser.evaluate(
        """[...document.querySelectorAll(".plot")].map((plot) => ({
          label: plot.getAttribute("aria-label"),
          caption: plot.closest("figure").querySelector("figcaption").textContent,
          width: plot.getBoundingClientRect().width,
          height: plot.getBoundingClientRect().height,
          lines: [...plot.querySelectorAll(".line, .dots")].filter((p) => p.getTotalLength() >= 0
            && p.getAttribute("d").length > 4).length,
          ticks: plot.querySelectorAll(".xtick").length + plot.querySelectorAll(".ytick").length,
        }))"""
    )
    assert len(plots) >= 18
    for plot in plots:
        assert plot["width"] > 300, plot
        assert plot["height"] > 200, plot
        assert plot["lines"], plot
        assert plot["ticks"] >= 4, plot
        assert plot["caption"], plot
        assert len(plot["label"]) > 60, plot


def test_tick_labels_do_not_overlap(browser, page) -> None:
    for width in (1280, 390):
        open_at(browser, page, width, "light")
        overlaps = browser.evaluate(
            """[...document.querySelectorAll(".plot")].flatMap((plot) => {
              const boxes = [...plot.querySelectorAll(".xtick")].filter((t) => t.checkVisibility())
                .map((t) => t.getBoundingClientRect()).sort((a, b) => a.left - b.left);
              return boxes.slice(1).filter((b, i) => b.left < boxes[i].right + 2)
                .map(() => plot.getAttribute("aria-label").slice(0, 60));
            })"""
        )
        assert overlaps == [], width


def test_the_toggle_changes_the_colours_and_is_remembered(browser, page) -> None:
    open_at(browser, page, 1280, "light")
    paper = "getComputedStyle(document.body).backgroundColor"
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    light = browser.evaluate(paper)
    assert browser.evaluate(pressed) == "false"
    browser.evaluate("document.getElementById('theme').click()")
    dark = browser.evaluate(paper)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < sum(map(int, re.findall(r"\d+", light)))
    assert browser.evaluate(pressed) == "true"
    browser.open(page.as_uri())
    assert browser.evaluate(paper) == dark
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(paper) == light
    browser.evaluate("localStorage.clear()")
    browser.scheme("dark")
    browser.open(page.as_uri())
    assert browser.evaluate(paper) == dark
    assert browser.problems == []


def test_points_are_read_off_by_keyboard_and_pointer(browser, page) -> None:
    open_at(browser, page, 1280, "light")
    browser.evaluate("document.getElementById('plot-0').focus()")
    tip = "document.querySelector('#plot-0 .tip')"
    assert browser.evaluate(f"{tip}.hidden")
    browser.key("Home")
    first = browser.evaluate(f"{tip}.textContent")
    assert first.startswith("640  samples seen")
    assert "noise scale, batch-32: 23.17 (16.22 to no end)" in first
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert browser.evaluate(f"{tip}.textContent") != first
    browser.key("End")
    assert "noise scale, batch-32: 400 (280 to 640)" in browser.evaluate(f"{tip}.textContent")
    browser.key("Escape")
    assert browser.evaluate(f"{tip}.hidden")
    box = browser.evaluate(
        "(() => { const b = document.getElementById('plot-0').getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + 50]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert "noise scale" in browser.evaluate(f"{tip}.textContent")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.evaluate(f"{tip}.hidden")
    # Everything that can be used by mouse is reached by tabulator.
    browser.open(page.as_uri())
    seen = set()
    for _ in range(12):
        browser.key("Tab")
        seen.add(browser.evaluate("document.activeElement.className || document.activeElement.id"))
    assert {"skip", "theme"} <= seen
    assert browser.problems == []


def test_data_can_be_downloaded(browser, page, tmp_path) -> None:
    open_at(browser, page, 1280, "light")
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.evaluate("document.querySelector('.download').click()")
    target = tmp_path / "batch-32.json"
    end = time.monotonic() + 20
    while not target.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert target.read_text().startswith('[{"step":20,')
    assert browser.problems == []


def test_it_prints_light_on_pages(browser, page) -> None:
    open_at(browser, page, 1280, "dark")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate(
        "getComputedStyle(document.querySelector('.block')).backgroundColor"
    ) == ("rgb(255, 255, 255)")
    hidden = "[...document.querySelectorAll('nav, button')].every((n) => !n.checkVisibility())"
    assert browser.evaluate(hidden)
    assert len(browser.call("Page.printToPDF")["data"]) > 50_000
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
