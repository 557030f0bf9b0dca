"""report.html in a real browser. Needs bokeh, playwright and a Chromium on the path."""

import time

import pytest

from gptforge.report import html_report
from gptforge.report.html_report import save_report
from tests.browser import browser as browser
from tests.browser import needs_chromium
from tests.report.run_folders import write_run

pytest.importorskip("bokeh", reason="bokeh is not installed")
pytestmark = needs_chromium

LOSSES = {100: 3.0, 200: 2.5, 300: 2.2, 400: 2.1}
RANGES = """[...Bokeh.index.roots].filter(view => view.model.reset).map(
    ({model}) => [model.x_range.start, model.x_range.end])"""


@pytest.fixture(autouse=True)
def blank_pictures() -> None:
    """Not here: they are what is tested."""


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the report of a run; requests, console errors and JavaScript errors fail the test."""
    problems = []
    folder = write_run(tmp_path / "run", LOSSES, preset="debug")
    (folder / "samples.md").write_text("## After 9 steps\n\n~~~text\nTo be\n~~~\n", "utf-8")
    context = browser.new_context(viewport={"width": 1200, "height": 1000})

    def open_page():
        path = save_report(folder)
        page = context.new_page()
        page.set_default_timeout(60000)
        page.on(
            "request",
            lambda r: r.url.startswith(("file:", "data:", "blob:")) or problems.append(r.url),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert problems == []


def wait_until(page, condition: str) -> None:
    """Like `wait_for_function`, whose use of eval the page's security policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def canvas_center(page) -> tuple[float, float]:
    """Where the middle of the first panel is, once it is drawn."""
    wait_until(page, "window.Bokeh !== undefined && Bokeh.index.roots.length >= 4")
    wait_until(page, "Bokeh.documents.every(document => document.is_idle)")
    box = page.locator(".curves canvas").first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_pointing_at_a_curve_shows_values(visit) -> None:
    page = visit()
    x, y = canvas_center(page)
    page.mouse.move(x, y, steps=3)
    tip = page.locator(".bk-Tooltip:visible", has_text="training").first
    tip.wait_for()
    text = tip.evaluate("e => e.shadowRoot.textContent")
    assert "step 1" in text and "training 2.0000" in text


def test_dragging_zooms_all_curves_and_a_double_click_resets(visit) -> None:
    page = visit()
    x, y = canvas_center(page)
    before = page.evaluate(RANGES)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 200, y, steps=5)
    page.mouse.up()
    wait_until(page, f"JSON.stringify({RANGES}) !== JSON.stringify({before})")
    after = page.evaluate(RANGES)
    assert len({tuple(pair) for pair in after}) == 1
    assert before[0][0] < after[0][0] < after[0][1] < before[0][1]
    losses = "[...Bokeh.index.roots].find(view => view.model.name === 'losses').model.y_range"
    # Of all losses, only those below 2.5 are still in view.
    wait_until(page, f"{losses}.end < 2.6")
    page.mouse.dblclick(x, y)
    wait_until(page, f"JSON.stringify({RANGES}) === JSON.stringify({before})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("has_bokeh", [True, False])
def test_the_page_is_accessible_and_fits_a_phone(visit, monkeypatch, scheme, has_bokeh) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core")
    monkeypatch.setattr(html_report, "has_bokeh", lambda: has_bokeh)
    page = visit()
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    if has_bokeh:
        canvas_center(page)
    report = axe.Axe().run(page)
    assert report.violations_count == 0, report.generate_report()
    page.set_viewport_size({"width": 390, "height": 844})
    wait_until(page, "document.documentElement.scrollWidth <= 390")
