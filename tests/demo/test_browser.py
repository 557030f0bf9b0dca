"""The page in a real browser.

Needs playwright and a Chromium on the path (Debian: apt-get install chromium).
"""

import json
import re
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.browser import browser as browser
from tests.browser import needs_chromium
from tests.demo.serving import ROOT, SLOW, server
from tests.demo.serving import folder as folder

pytest.importorskip("uvicorn", reason="uvicorn is not installed")

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with server(folder, str(ROOT / "gpt.py"), "demo", "run", "--device", "cpu") as address:
        yield address


@pytest.fixture(scope="module")
def slow_address(folder) -> Iterator[str]:
    """Of a server for one visitor, one more in the queue, and slow tokens."""
    with server(folder, "-c", SLOW, "1") as address:
        yield address


@pytest.fixture
def visit(browser):
    """Opens pages; requests to other servers and JavaScript errors fail the test."""
    problems, contexts = [], []

    def open_page(address, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60000)

        def check(request) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                problems.append(request.url)

        page.on("request", check)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("body.ready")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def visitor(visit, address):
    return partial(visit, address)


def set_value(page, name: str, value) -> None:
    page.locator(f"[name={name}]").evaluate(
        "(e, value) => { e.value = value; e.dispatchEvent(new Event('input', {bubbles: true})); }",
        str(value),
    )


def generate(page, **settings) -> str:
    """Set fields, click the button and wait for the complete text; returns it."""
    for name, value in settings.items():
        set_value(page, name, value)
    page.click("#go")
    page.wait_for_selector("#go:has-text('Generate')")
    return text_of(page)


def text_of(page, sheet: int = 0) -> str:
    return page.locator(".sheet .text").nth(sheet).evaluate("e => e.textContent")


def count(page, sheet: int = 0) -> int:
    return page.locator(".sheet .text").nth(sheet).locator(".t").count()


def letters(page):
    """The tokens that have a box to point at: a line break has none."""
    return page.locator(".t", has_text=re.compile(r"[A-Za-z]"))


def status(page, sheet: int = 0) -> str:
    return page.locator(".status").nth(sheet).inner_text()


def wait_for_tokens(page, minimum: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('.sheet .t').length >= {minimum}")


def test_type_and_generate(visitor) -> None:
    page = visitor()
    text = generate(page, prompt="But soft, what", seed=1)
    assert page.inner_text(".prompt") == text[:14] == "But soft, what"
    assert count(page) == len(text) - 14 == 300
    assert "300 tokens" in status(page)
    # The tip of a token has the probabilities of the most likely ones.
    letters(page).nth(3).hover()
    tip = page.locator("#tip").inner_text()
    assert tip.count("%") == 6
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()
    # A character model begins without the tints.
    colours = "all => [...new Set(all.map(e => getComputedStyle(e).backgroundColor))]"
    tokens = page.locator(".t")
    assert tokens.evaluate_all(colours) == ["rgba(0, 0, 0, 0)"]
    page.get_by_label("Tint").check()
    assert len(tokens.evaluate_all(colours)) > 1


def test_text_is_copied_and_downloaded_as_it_is(visitor) -> None:
    page = visitor(permissions=["clipboard-read", "clipboard-write"])
    assert page.get_by_role("button", name="Copy", exact=True).is_disabled()
    text = generate(page, seed=3)
    assert "\n" in text
    page.get_by_role("button", name="Copy", exact=True).click()
    page.wait_for_selector("button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == text
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "best-seed-3.txt"
    assert download.value.path().read_text() == text
    # Also where the browser allows no access to the clipboard.
    page.evaluate("navigator.clipboard.writeText('')")
    page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject())")
    page.get_by_role("button", name="Download").focus()
    page.wait_for_selector("button.copy:has-text('Copy')")
    page.locator(".copy").first.click()
    page.wait_for_function("text => navigator.clipboard.readText().then(t => t === text)", arg=text)
    # And text that the reader selects.
    selected = "e => { getSelection().selectAllChildren(e); return String(getSelection()); }"
    assert page.locator(".text").first.evaluate(selected).strip() == text.strip()


def test_text_streams_and_stops(visit, slow_address) -> None:
    page = visit(slow_address)
    set_value(page, "max_tokens", 900)
    page.click("#go")
    for minimum in (3, 10, 20):
        wait_for_tokens(page, minimum)
    assert count(page) < 900
    assert page.locator(".text[aria-busy]").count() == 1
    assert page.inner_text("#go") == "Stop"
    page.click("#go")
    page.wait_for_selector("#go:has-text('Generate')")
    before, shown = count(page), status(page)
    assert "stopped" in shown and "seed" in shown
    assert page.inner_text("#live") == shown
    time.sleep(0.5)
    assert count(page) == before
    assert page.locator(".text[aria-busy]").count() == 0
    # The shown seed begins with the same text.
    text = text_of(page)
    page.fill("[name=seed]", shown.partition("seed ")[2].partition(" ")[0])
    page.fill("#prompt", page.input_value("#prompt"))
    page.press("#prompt", "Control+Enter")
    page.wait_for_function("n => document.querySelectorAll('.t').length > n", arg=before)
    page.keyboard.press("Escape")
    page.wait_for_selector("#go:has-text('Generate')")
    assert text_of(page).startswith(text)


def test_text_is_followed_unless_the_reader_scrolls_up(visit, slow_address) -> None:
    page = visit(slow_address, viewport={"width": 1280, "height": 400})
    # A narrow sheet, so that it is soon full.
    page.add_style_tag(content=".text { min-height: 0 !important; height: 90px !important; }")
    page.fill("#prompt", "what\n" * 4)
    set_value(page, "max_tokens", 900)
    page.click("#go")
    from_end = (
        "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.querySelector('.text'))"
    )
    for minimum in (10, 30):
        wait_for_tokens(page, minimum)
        assert page.evaluate(from_end) < 8
    page.locator(".text").first.hover()
    page.mouse.wheel(0, -60)
    page.wait_for_function(f"{from_end} > 20")
    before = page.evaluate("document.querySelector('.text').scrollTop")
    wait_for_tokens(page, count(page) + 20)
    assert page.evaluate("document.querySelector('.text').scrollTop") <= before
    page.mouse.wheel(0, 2000)
    page.wait_for_function(f"{from_end} < 8")
    wait_for_tokens(page, count(page) + 20)
    assert page.evaluate(from_end) < 8
    page.keyboard.press("Escape")


def test_reloading_the_page_stops_the_generation(visit, slow_address) -> None:
    page, other = visit(slow_address), visit(slow_address)
    set_value(page, "max_tokens", 1000)
    page.click("#go")
    wait_for_tokens(page, 5)
    page.reload()
    page.wait_for_selector(".text.blank")
    # It would have taken minutes, for which the next visitor would wait.
    other.click("#go")
    wait_for_tokens(other, 3)


def test_a_full_queue_is_reported(visit, slow_address) -> None:
    pages = [visit(slow_address) for _ in range(3)]
    set_value(pages[0], "max_tokens", 1000)
    pages[0].click("#go")
    wait_for_tokens(pages[0], 3)
    pages[1].click("#go")
    pages[1].wait_for_selector(".status:has-text('queue: number 1')")
    pages[2].click("#go")
    pages[2].wait_for_selector(".error:has-text('many visitors are waiting')")
    pages[0].click("#go")
    wait_for_tokens(pages[1], 3)


def test_settings_reach_the_model(visitor) -> None:
    page = visitor()
    texts = []
    for checkpoint in ("best", "step-000001", "best"):
        texts.append(generate(page, seed=7, max_tokens=40, checkpoint=checkpoint))
        assert count(page) == 40
        assert "seed 7" in status(page)
    assert texts[0] == texts[2] != texts[1]
    page.fill("[name=seed]", "seven")
    page.press("[name=seed]", "Enter")
    assert "whole number, not seven" in page.inner_text(".error")


def test_alternatives_are_listed_by_probability(visitor) -> None:
    # JavaScript lists keys that are whole numbers before the others.
    shown = visitor().evaluate("""async () => {
        const { showTip } = await import("./tip.js");
        const span = document.createElement("span");
        span.token = { text: "x", probability: 0.1, alternatives: { 1: -3, a: -1, 2: -2 } };
        showTip(span);
        return document.getElementById("tip").innerText.split("\\n");
    }""")
    assert [text for text in shown if text in ("1", "2", "a")] == ["a", "2", "1"]


def test_errors_appear_beside_the_text(visitor) -> None:
    page = visitor()
    text = generate(page, max_tokens=20)
    generate(page, prompt="日本")
    assert "'日'" in page.inner_text(".error")
    assert text_of(page) == text
    generate(page, prompt="light")
    assert page.locator(".error:visible").count() == 0


def test_a_lost_server_is_an_error(visitor) -> None:
    page = visitor()
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#go")
    page.wait_for_selector(".error:visible")
    assert page.inner_text("#go") == "Generate"


def test_prompts_are_suggested_from_the_text(visitor) -> None:
    page = visitor()
    assert page.input_value("#prompt") == "But soft, what light"
    page.fill("#prompt", "")
    page.locator("#prompts button").first.click()
    assert page.input_value("#prompt") == "But soft, what light"


def test_settings_survive_a_reload_and_are_a_link(visitor) -> None:
    page = visitor(permissions=["clipboard-read", "clipboard-write"])
    first = generate(page, prompt="what\nlight", max_tokens=50, temperature=0.5, top_k=7)
    page.get_by_label("Compare").check()
    set_value(page, "temperature2", 1.5)
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.input_value("#prompt") == "what\nlight"
    fields = ["max_tokens", "temperature", "top_k", "temperature2"]
    values = [page.locator(f"[name={name}]").input_value() for name in fields]
    assert values == ["50", "0.5", "7", "1.5"]
    assert page.locator(".sheet:visible").count() == 2
    page.get_by_label("Compare").uncheck()
    generate(page)
    first = text_of(page)
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_selector("#link:has-text('Copied')")
    link = page.evaluate("navigator.clipboard.readText()")
    # The link has the seed, so it leads to the same text.
    other = visitor()
    other.goto(link)
    other.wait_for_function("document.querySelector('[name=seed]').value !== ''")
    assert generate(other) == first


def test_a_link_with_values_that_are_invalid_here(visitor, address) -> None:
    page = visitor()
    page.goto(f"{address}/#checkpoint=step-999999&prompt=light&top_k2=-5&max_tokens=20&tab=x")
    page.wait_for_function("document.querySelector('#prompt').value === 'light'")
    assert page.locator("[name=checkpoint]").input_value() == "best"
    # The browser would refuse to submit what is invalid, even in a hidden sheet.
    generate(page)
    assert count(page) == 20


def test_two_checkpoints_side_by_side(visitor) -> None:
    page = visitor()
    page.get_by_label("Compare").check()
    # The second is from before the model had learned.
    assert page.locator("[name=checkpoint2]").input_value() == "step-000001"
    first = generate(page, max_tokens=40, seed=5)
    second = text_of(page, 1)
    assert count(page) == count(page, 1) == 40
    assert first != second
    boxes = [page.locator(".sheet").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    # The same checkpoint and settings give the same text.
    assert generate(page, checkpoint2="best") == text_of(page, 1) == first


def test_keyboard(visitor) -> None:
    page = visitor()
    generate(page, max_tokens=30, seed=1)
    page.focus(".text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".t.current").count() == 1
    assert page.locator("#tip").is_visible()
    assert "percent" in page.inner_text("#live")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    # From the text to the button after it, past all tokens.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Copy"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.focus("#tab-write")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-training"
    assert page.locator("#training").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_violation(visitor, scheme, width) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core")
    page = visitor(viewport={"width": width, "height": 800}, color_scheme=scheme)

    def check() -> None:
        report = axe.Axe().run(page)
        assert report.violations_count == 0, report.generate_report()

    check()
    page.get_by_label("Compare").check()
    page.get_by_label("Tint").check()
    generate(page, max_tokens=60, seed=1)
    letters(page).nth(3).hover()
    set_value(page, "seed", "x")
    page.click("#go")
    assert page.locator(".error:visible").count() == 1
    check()
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector("#charts svg")
    check()


def test_the_page_fits_a_phone(visitor) -> None:
    page = visitor(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    set_value(page, "seed", 1)
    page.tap("#go")
    page.wait_for_function("document.querySelector('.status').innerText.includes('300 tokens')")
    # Nothing is wider than the screen, not even hidden overflow.
    right = "Math.max(...[...document.querySelectorAll('#results *')]" + (
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert page.evaluate(right) <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    letters(page).nth(10).tap()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.locator("#go").bounding_box()["height"] >= 44
    page.get_by_role("tab", name="Training").tap()
    page.wait_for_selector("#charts svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_visitors_at_once(visitor) -> None:
    first, second = (visitor(viewport={"width": 900, "height": 700}) for _ in range(2))
    first.fill("#prompt", "what")
    second.fill("#prompt", "light")
    first.click("#go")
    second.click("#go")
    for page, prompt in ((second, "light"), (first, "what")):
        page.wait_for_function("document.querySelector('.status').innerText.includes('300 tokens')")
        assert page.inner_text(".prompt") == prompt
        assert count(page) == 300


def test_the_training_tab_is_live(visitor, folder) -> None:
    page = visitor()
    page.get_by_role("tab", name="Training").click()
    assert "20" in page.inner_text(".tiles div >> nth=0")
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.read_text()
    late = {"event": "train", "step": 4998, "loss": 1.0, "dt_ms": 1, "tok_per_sec": 1}
    metrics.write_text(before + json.dumps({**late, "norm": 1, "lr": 1}) + "\n")
    page.wait_for_function("document.querySelector('.tiles div').innerText.includes('4,999')")
    metrics.write_text(before)


def test_curves(visitor, folder) -> None:
    page = visitor()
    page.get_by_role("tab", name="Training").click()
    charts = page.locator("figure")
    assert charts.locator("b").all_inner_texts() == [
        "Loss", "Speed", "Learning rate", "Gradient norm"
    ]  # fmt: skip
    for n, unit in ((0, "nats per token"), (1, "tokens per second")):
        assert {"step", unit} <= set(charts.nth(n).locator("text").all_text_contents())
    # Tokens per second begin at 0.
    assert charts.nth(1).locator("text").first.text_content() == "0"
    # A mark for each evaluation.
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    evals = [event for line in lines if (event := json.loads(line))["event"] == "eval"]
    assert charts.nth(0).locator(".mark").count() == len(evals)
    # Pointing at one shows the values of the same step in all of them.
    charts.nth(1).locator("svg").hover()
    shown = charts.locator("output").all_inner_texts()
    assert len({text.partition(":")[0] for text in shown}) == 1
    assert "train" in shown[0] and "held-out" in shown[0]
    charts.nth(0).locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert charts.nth(0).locator("output").inner_text().startswith("step 1:")


def test_samples_of_the_run(visitor) -> None:
    page = visitor()
    page.get_by_role("tab", name="Training").click()
    shown = []
    for n, step in ((0, "10 steps"), (1, "20 steps")):
        set_value(page, "sample", n)
        assert page.inner_text("#history output") == step
        shown.append(page.inner_text("#history .text"))
    assert shown[0] != shown[1]
