"""Pictures of the web page for the docs, taken in a headless Chromium.

    gptforge demo runs/shakespeare-cpu --port 7860 &
    python scripts/page_pictures.py http://127.0.0.1:7860 docs/images

Needs playwright and a Chromium on the path. The seed is fixed: pictures of a run are reproducible.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

SEED = "22"
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for size, scheme, tip in (
            ("desktop", "light", 84),
            ("desktop", "dark", 84),
            ("phone", "light", 42),
            ("phone", "dark", None),
        ):
            take(browser, args.address, args.folder, size=size, scheme=scheme, tip=tip)
        browser.close()


def take(
    browser: Browser, address: str, folder: Path, *, size: str, scheme: str, tip: int | None
) -> None:
    """Generate a text, hover over a token or open the settings, then show the training tab."""
    width, height = SIZES[size]
    is_phone = size == "phone"
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        is_mobile=is_phone,
        has_touch=is_phone,
        device_scale_factor=2 if is_phone else 1.5,
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#write")
    settings = page.get_by_role("button", name="Settings")
    settings.click()
    page.get_by_label("Seed").fill(SEED)
    page.get_by_label("number input for Length, tokens").fill("400")
    page.get_by_label("Seed").press("Tab")
    if tip is not None:
        settings.click()
    page.click("#write")
    page.wait_for_function(f"document.querySelector('#status').innerText.includes('seed {SEED}')")
    page.wait_for_function("!document.querySelector('.caret')")
    page.wait_for_timeout(400)
    if tip is not None:
        token = page.locator(".output .t").nth(tip)
        token.tap() if is_phone else token.hover()
    page.screenshot(path=folder / f"page-{size}-{scheme}.png", full_page=tip is None)
    if (size, scheme) in (("desktop", "dark"), ("phone", "light")):
        page.get_by_role("tab", name="Training").click()
        page.wait_for_selector(".training img")
        page.wait_for_timeout(400)
        page.screenshot(path=folder / f"training-{size}-{scheme}.png", full_page=True)
    context.close()


if __name__ == "__main__":
    main()
