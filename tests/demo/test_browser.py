"""The page in a real browser.

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

# One visitor at a time, one more in the queue, and slow tokens.
limits.MAX_CONCURRENT, limits.MAX_QUEUED = 1, 1
stream_tokens = LanguageModel.stream_tokens


def slow_stream_tokens(*args, **more):
    for token in stream_tokens(*args, **more):
        time.sleep(0.03)
        yield token


LanguageModel.stream_tokens = slow_stream_tokens
launch("run", port=int(sys.argv[1]), device="cpu")
"""


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    demo = ("demo", "run", "--port", "PORT", "--device", "cpu")
    with server(folder, str(ROOT / "gpt.py"), *demo) as address:
        yield address


@pytest.fixture(scope="module")
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
    """Opens pages; requests to other servers and JavaScript errors fail the test."""
    problems, contexts = [], []

    def open_page(address, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20000)

        def check(request) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                problems.append(request.url)

        page.on("request", check)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#write")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def visitor(visit, address):
    return partial(visit, address)


def set_length(page, tokens: int) -> None:
    page.get_by_role("button", name="Settings").click()
    length = page.get_by_label("number input for Length, tokens")
    length.wait_for()
    # Gradio sets the value of a slider once more just after it is first shown.
    page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    length.fill(str(tokens))
    length.press("Tab")


def write(page) -> None:
    """Click the button and wait for the complete text."""
    page.evaluate("document.querySelector('.output').dataset.old = 1")
    page.click("#write")
    wait_until_done(page)


def wait_until_done(page) -> None:
    page.wait_for_selector(".output:not([data-old])")
    page.wait_for_function("document.querySelector('#status').innerText.includes(' · seed ')")
    page.wait_for_function("!document.querySelector('.caret')")


def point_at(locator) -> None:
    """Hover; on failure, show the styles of the parents."""
    try:
        locator.hover()
    except playwright.TimeoutError as error:
        script = """e => {
            const parents = [];
            for (; e; e = e.parentElement) {
                const style = getComputedStyle(e), box = e.getBoundingClientRect();
                const size = `${box.width}x${box.height}`;
                parents.push([e.tagName, e.id, e.className, style.display, style.visibility, size]);
            }
            return parents.join("\\n");
        }"""
        raise AssertionError(f"{error}\n{locator.evaluate(script)}") from None


def test_type_and_generate(visitor) -> None:
    page = visitor()
    page.fill("#prompt textarea", "But soft, what")
    write(page)
    assert page.inner_text(".output .prompt") == "But soft, what"
    assert page.locator(".output .t").count() == 300
    assert "300 tokens" in page.inner_text("#status")
    # The tip of a token.
    point_at(page.locator(".output .t").nth(3))
    tip = page.locator(".output .t").nth(3).get_attribute("data-tip")
    assert re.search(r"probability \d+\.\d%", tip)
    assert len(tip.splitlines()) == 7
    content = "getComputedStyle(document.querySelectorAll('.output .t')[3], '::after').content"
    assert "probability" in page.evaluate(content)
    # The tints can be turned off.
    page.locator("#tint input").uncheck()
    colour = "getComputedStyle(document.querySelector('.output .t.s0, .output .t')).backgroundColor"
    page.wait_for_function(f"{colour} === 'rgba(0, 0, 0, 0)'")


def count(page) -> int:
    return page.locator(".output .t").count()


def wait_for_tokens(page, minimum: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('.output .t').length >= {minimum}")


def test_text_streams_and_stops(visit, slow_address) -> None:
    page = visit(slow_address)
    page.click("#write")
    for minimum in (3, 10, 20):
        wait_for_tokens(page, minimum)
    assert count(page) < 300
    assert page.locator(".caret").is_visible()
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').innerText.includes('stopped')")
    time.sleep(0.5)
    before = count(page)
    time.sleep(0.7)
    assert count(page) == before
    assert page.locator(".caret:visible").count() == 0
    # It can start again.
    page.fill("#prompt textarea", "light")
    page.click("#write")
    page.wait_for_function("document.querySelector('.output .prompt').innerText === 'light'")
    wait_for_tokens(page, 3)


def test_reloading_the_page_stops_the_generation(visit, slow_address) -> None:
    page, other = visit(slow_address), visit(slow_address)
    set_length(page, 1000)
    page.click("#write")
    wait_for_tokens(page, 5)
    page.reload()
    page.wait_for_selector(".output.blank")
    # It would have taken half a minute, for which the next visitor would wait.
    start = time.monotonic()
    other.click("#write")
    wait_for_tokens(other, 3)
    assert time.monotonic() - start < 15


def test_a_full_queue_is_reported(visit, slow_address) -> None:
    pages = [visit(slow_address) for _ in range(3)]
    pages[0].click("#write")
    wait_for_tokens(pages[0], 3)
    pages[1].click("#write")
    # Visitors in the queue see their position.
    waiting = pages[1].locator("#status >> text=/queue: 1/").first
    waiting.wait_for()
    assert waiting.bounding_box()["y"] > pages[1].locator(".output").bounding_box()["y"]
    assert waiting.evaluate("e => e.parentElement.clientHeight") > 10
    pages[2].click("#write")
    pages[2].wait_for_selector("text=/busy/")
    pages[0].click("#stop")
    wait_for_tokens(pages[1], 3)


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("call/write", 70_000, 403), ("queue/join", 70_000, 413), ("upload", 10, 403)],
)
def test_requests_that_the_page_never_makes_are_refused(address, path, size, status) -> None:
    request = urllib.request.Request(f"{address}/gradio_api/{path}", data=b"x" * size)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == status
    refused.value.close()


def test_settings_reach_the_model(visitor, folder) -> None:
    page = visitor()
    set_length(page, 40)
    page.get_by_label("Seed").fill("7")
    texts = []
    for name in ("last", "step-000010", "last"):
        page.get_by_label("Checkpoint").click()
        page.get_by_role("option", name=name).click()
        write(page)
        page.wait_for_function("document.querySelector('#status').innerText.includes('seed 7')")
        assert count(page) == 40
        texts.append(page.inner_text(".output"))
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
    page.wait_for_selector(".output.blank")
    write(page)


def test_the_page_fits_a_phone(visitor) -> None:
    page = visitor(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.tap("#write")
    wait_until_done(page)
    # Nothing is wider than the screen, not even hidden overflow.
    right = "Math.max(...[...document.querySelectorAll('#sheet *')]" + (
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert page.evaluate(right) <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    token = page.locator(".output .t").nth(10)
    token.tap()
    assert token.evaluate("e => e.matches(':focus')")
    # The tip fits the screen.
    width = "e => parseFloat(getComputedStyle(e, '::after').width)"
    assert 80 < token.evaluate(width) <= 358
    box = page.locator("#write").bounding_box()
    assert box["height"] >= 44
    page.get_by_role("tab", name="Training").tap()
    page.wait_for_selector(".training img")
    page.wait_for_function("document.querySelector('.training img').naturalWidth > 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_visitors_at_once(visitor) -> None:
    first, second = (visitor(viewport={"width": 900, "height": 700}) for _ in range(2))
    first.fill("#prompt textarea", "what")
    second.fill("#prompt textarea", "light")
    first.click("#write")
    second.click("#write")
    wait_until_done(second)
    wait_until_done(first)
    assert first.inner_text(".output .prompt") == "what"
    assert second.inner_text(".output .prompt") == "light"
    assert first.locator(".output .t").count() == second.locator(".output .t").count() == 300


def test_the_training_tab_is_live(visitor, folder) -> None:
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
