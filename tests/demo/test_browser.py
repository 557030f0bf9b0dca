"""The page in a real browser, as visitors meet it.

Needs gradio, playwright and a Chromium on the path (Debian: apt-get install chromium).
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")
ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "GPTFORGE_DEBUG": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run to show: 20 steps on a made-up play."""
    folder = tmp_path_factory.mktemp("demo")
    line = "ROMEO:\nBut soft, what light through yonder window breaks?\n\n"
    (folder / "play.txt").write_text(line * 150)
    train = ["--preset", "debug", "--device", "cpu", "--input", "play.txt", "--out_dir", "run"]
    command = [sys.executable, str(ROOT / "gpt.py"), *train]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=os.environ | QUIET)
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "gpt.py"), "demo", "run", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | QUIET,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in first, first + process.stdout.read()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser, address):
    """Opens pages that fail the test for a request to anywhere else, or an error in the page."""
    troubles, contexts = [], []

    def visit(**how):
        context = browser.new_context(**how)
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

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


def ask_for(page, tokens: int, heat: float | None = None) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Length, tokens").fill(str(tokens))
    page.get_by_label("number input for Length, tokens").press("Tab")


def wait_until_done(page) -> None:
    page.wait_for_function("document.querySelector('#told').innerText.includes(' · seed ')")
    page.wait_for_function("!document.querySelector('.caret')")


def test_typing_and_writing(visitor) -> None:
    page = visitor(viewport={"width": 1280, "height": 860})
    page.fill("#prompt textarea", "But soft, what")
    page.click("#write")
    wait_until_done(page)
    assert page.inner_text(".paper .prompt") == "But soft, what"
    assert page.locator(".paper .t").count() == 300
    assert "300 tokens" in page.inner_text("#told")
    # How sure it was, by pointing at a token.
    page.locator(".paper .t").nth(3).hover()
    tip = page.locator(".paper .t").nth(3).get_attribute("data-tip")
    assert re.search(r"was given \d+\.\d%", tip)
    assert len(tip.splitlines()) == 7
    shown = "getComputedStyle(document.querySelectorAll('.paper .t')[3], '::after').content"
    assert "was given" in page.evaluate(shown)
    # The tints can be turned off.
    page.locator("#tint input").uncheck()
    colour = "getComputedStyle(document.querySelector('.paper .t.s0, .paper .t')).backgroundColor"
    page.wait_for_function(f"{colour} === 'rgba(0, 0, 0, 0)'")


def test_text_streams_and_stops(visitor) -> None:
    page = visitor(viewport={"width": 1280, "height": 860})
    ask_for(page, 1000)
    page.click("#write")
    page.wait_for_function("document.querySelectorAll('.paper .t').length > 5")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#told').innerText.includes('stopped')")
    time.sleep(0.5)
    count = page.locator(".paper .t").count()
    time.sleep(0.7)
    assert page.locator(".paper .t").count() == count
    assert 5 < count <= 1000
    # And it writes again.
    page.click("#write")
    page.wait_for_function("document.querySelector('.caret')")


def test_examples_errors_and_reloading(visitor) -> None:
    page = visitor(viewport={"width": 1280, "height": 860})
    page.fill("#prompt textarea", "日本")
    page.click("#write")
    page.wait_for_selector(".note.error")
    assert "'日'" in page.inner_text(".note.error")
    page.locator(".chip").first.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('ROMEO')")
    page.click("#write")
    wait_until_done(page)
    assert page.locator(".note.error").count() == 0
    page.reload()
    page.wait_for_selector(".paper.blank")
    page.click("#write")
    wait_until_done(page)


def test_a_phone_shows_all_of_it(visitor) -> None:
    page = visitor(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.tap("#write")
    wait_until_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".paper .t").nth(10).tap()
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
    page = visitor(viewport={"width": 1280, "height": 860})
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector(".training .tile")
    assert "20" in page.inner_text(".tile >> nth=0")
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.read_text()
    late = '{"event": "train", "step": 4998, "loss": 1.0, "dt_ms": 1, "tok_per_sec": 1}\n'
    metrics.write_text(before + late)
    page.wait_for_function("document.querySelector('.tile').innerText.includes('4,999')")
    metrics.write_text(before)
