"""The page in a real browser, as visitors meet it.

Needs gradio, playwright and a Chromium on the path (Debian: apt-get install chromium).
"""

import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial

import pytest

from tests.demo.serving import ROOT, server
from tests.demo.serving import folder as folder

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")


SLOW = """
import sys, time
import gptforge.demo.sessions as limits
from gptforge.demo.launch import launch
from gptforge.inference.language_model import LanguageModel

# One visitor at a time, one more waits, and each token takes its time.
limits.MAX_CONCURRENT, limits.MAX_QUEUED = 1, 1
stream_tokens = LanguageModel.stream_tokens


def slowly(*args, **more):
    for token in stream_tokens(*args, **more):
        time.sleep(0.03)
        yield token


LanguageModel.stream_tokens = slowly
launch("run", port=int(sys.argv[1]), device="cpu")
"""


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    demo = ("demo", "run", "--port", "PORT", "--device", "cpu")
    with server(folder, str(ROOT / "gpt.py"), *demo) as address:
        yield address


@pytest.fixture
def slow_address(folder) -> Iterator[str]:
    with server(folder, "-c", SLOW, "PORT") as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens pages that fail the test for a request to anywhere else, or an error in the page."""
    troubles, contexts = [], []

    def visiting(address, **how):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | how))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20000)

        def outside(request) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                troubles.append(request.url)

        page.on("request", outside)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#write")
        return page

    yield visiting
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def visitor(visit, address):
    return partial(visit, address)


def ask_for(page, tokens: int) -> None:
    page.get_by_role("button", name="Settings").click()
    length = page.get_by_label("number input for Length, tokens")
    length.wait_for()
    # Gradio draws a slider when it is first shown, and gives it its value once more a moment
    # after: faster than any hand, not faster than a test.
    page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    length.fill(str(tokens))
    length.press("Tab")


def write(page) -> None:
    """Press the button, and wait until all is written."""
    page.evaluate("document.querySelector('.paper').dataset.old = 1")
    page.click("#write")
    wait_until_done(page)


def wait_until_done(page) -> None:
    page.wait_for_selector(".paper:not([data-old])")
    page.wait_for_function("document.querySelector('#told').innerText.includes(' · seed ')")
    page.wait_for_function("!document.querySelector('.caret')")


def point_at(locator) -> None:
    """Hover, and say what hides it where it cannot be pointed at."""
    try:
        locator.hover()
    except playwright.TimeoutError as error:
        around = """e => {
            const told = [];
            for (; e; e = e.parentElement) {
                const style = getComputedStyle(e), box = e.getBoundingClientRect();
                const size = `${box.width}x${box.height}`;
                told.push([e.tagName, e.id, e.className, style.display, style.visibility, size]);
            }
            return told.join("\\n");
        }"""
        raise AssertionError(f"{error}\n{locator.evaluate(around)}") from None


def test_typing_and_writing(visitor) -> None:
    page = visitor()
    page.fill("#prompt textarea", "But soft, what")
    write(page)
    assert page.inner_text(".paper .prompt") == "But soft, what"
    assert page.locator(".paper .t").count() == 300
    assert "300 tokens" in page.inner_text("#told")
    # How sure it was, by pointing at a token.
    point_at(page.locator(".paper .t").nth(3))
    tip = page.locator(".paper .t").nth(3).get_attribute("data-tip")
    assert re.search(r"was given \d+\.\d%", tip)
    assert len(tip.splitlines()) == 7
    shown = "getComputedStyle(document.querySelectorAll('.paper .t')[3], '::after').content"
    assert "was given" in page.evaluate(shown)
    # The tints can be turned off.
    page.locator("#tint input").uncheck()
    colour = "getComputedStyle(document.querySelector('.paper .t.s0, .paper .t')).backgroundColor"
    page.wait_for_function(f"{colour} === 'rgba(0, 0, 0, 0)'")


def count(page) -> int:
    return page.locator(".paper .t").count()


def wait_for_tokens(page, least: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('.paper .t').length >= {least}")


def test_text_streams_and_stops(visit, slow_address) -> None:
    page = visit(slow_address)
    page.click("#write")
    for least in (3, 10, 20):
        wait_for_tokens(page, least)
    assert count(page) < 300
    assert page.locator(".caret").is_visible()
    page.click("#stop")
    page.wait_for_function("document.querySelector('#told').innerText.includes('stopped')")
    time.sleep(0.5)
    before = count(page)
    time.sleep(0.7)
    assert count(page) == before
    assert page.locator(".caret:visible").count() == 0
    # And it writes again, from the beginning.
    page.fill("#prompt textarea", "light")
    page.click("#write")
    page.wait_for_function("document.querySelector('.paper .prompt').innerText === 'light'")
    wait_for_tokens(page, 3)


def test_a_page_reloaded_in_the_middle_holds_nobody_up(visit, slow_address) -> None:
    page, other = visit(slow_address), visit(slow_address)
    ask_for(page, 1000)
    page.click("#write")
    wait_for_tokens(page, 5)
    page.reload()
    page.wait_for_selector(".paper.blank")
    # Half a minute of writing was asked for; whoever comes next does not wait for its end.
    begin = time.monotonic()
    other.click("#write")
    wait_for_tokens(other, 3)
    assert time.monotonic() - begin < 15


def test_a_full_queue_says_so(visit, slow_address) -> None:
    pages = [visit(slow_address) for _ in range(3)]
    pages[0].click("#write")
    wait_for_tokens(pages[0], 3)
    pages[1].click("#write")
    # Who waits sees that, and how many are before them.
    waiting = pages[1].locator("#told >> text=/queue: 1/").first
    waiting.wait_for()
    assert waiting.bounding_box()["y"] > pages[1].locator(".paper").bounding_box()["y"]
    assert waiting.evaluate("e => e.parentElement.clientHeight") > 10
    pages[2].click("#write")
    pages[2].wait_for_selector("text=/busy/")
    pages[0].click("#stop")
    wait_for_tokens(pages[1], 3)


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("call/write", 70_000, 403), ("queue/join", 70_000, 413), ("upload", 10, 403)],
)
def test_requests_that_no_visitor_sends_are_turned_away(address, path, size, status) -> None:
    request = urllib.request.Request(f"{address}/gradio_api/{path}", data=b"x" * size)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == status
    refused.value.close()


def test_settings_reach_the_model(visitor, folder) -> None:
    page = visitor()
    ask_for(page, 40)
    page.get_by_label("Seed").fill("7")
    texts = []
    for name in ("last", "step-000010", "last"):
        page.get_by_label("Checkpoint").click()
        page.get_by_role("option", name=name).click()
        write(page)
        page.wait_for_function("document.querySelector('#told').innerText.includes('seed 7')")
        assert count(page) == 40
        texts.append(page.inner_text(".paper"))
        page.get_by_label("number input for Length, tokens").fill("40")
    assert texts[0] == texts[2] != texts[1]
    page.get_by_label("Seed").fill("seven")
    page.click("#write")
    page.wait_for_selector(".note.error")
    assert "whole number, not seven" in page.inner_text(".note.error")


def test_examples_errors_and_reloading(visitor) -> None:
    page = visitor()
    page.fill("#prompt textarea", "日本")
    page.click("#write")
    page.wait_for_selector(".note.error")
    assert "'日'" in page.inner_text(".note.error")
    page.locator(".chip").first.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('ROMEO')")
    write(page)
    assert page.locator(".note.error").count() == 0
    page.reload()
    page.wait_for_selector(".paper.blank")
    write(page)


def test_a_phone_shows_all_of_it(visitor) -> None:
    page = visitor(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.tap("#write")
    wait_until_done(page)
    # Not even what overflow hides is wider than the screen.
    right = "Math.max(...[...document.querySelectorAll('#sheet *')]" + (
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert page.evaluate(right) <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    token = page.locator(".paper .t").nth(10)
    token.tap()
    assert token.evaluate("e => e.matches(':focus')")
    # What it says fits the screen.
    wide = "e => parseFloat(getComputedStyle(e, '::after').width)"
    assert 80 < token.evaluate(wide) <= 358
    box = page.locator("#write").bounding_box()
    assert box["height"] >= 44
    page.get_by_role("tab", name="Training").tap()
    page.wait_for_selector(".training svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_visitors_at_once(visitor) -> None:
    first, second = (visitor(viewport={"width": 900, "height": 700}) for _ in range(2))
    first.fill("#prompt textarea", "what")
    second.fill("#prompt textarea", "light")
    first.click("#write")
    second.click("#write")
    wait_until_done(second)
    wait_until_done(first)
    assert first.inner_text(".paper .prompt") == "what"
    assert second.inner_text(".paper .prompt") == "light"
    assert first.locator(".paper .t").count() == second.locator(".paper .t").count() == 300


def test_the_curves_are_live(visitor, folder) -> None:
    page = visitor()
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector(".training .tile")
    assert "20" in page.inner_text(".tile >> nth=0")
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.read_text()
    late = '{"event": "train", "step": 4998, "loss": 1.0, "dt_ms": 1, "tok_per_sec": 1}\n'
    metrics.write_text(before + late)
    page.wait_for_function("document.querySelector('.tile').innerText.includes('4,999')")
    metrics.write_text(before)
