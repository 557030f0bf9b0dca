"""Pictures of the web page for the docs, taken in a headless Chromium.

    gptforge demo runs/shakespeare-cpu --port 7860 &
    python scripts/page_pictures.py http://127.0.0.1:7860 docs/images

Needs playwright and a Chromium on the path. The seed is fixed: pictures of a run are reproducible.
"""

import argparse
import re
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

SETTINGS = "#seed=22&temperature=0.7&temperature2=0.7"
DESKTOP = {"viewport": {"width": 1280, "height": 880}, "device_scale_factor": 1.5}
PHONE = {
    "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2,
    "is_mobile": True, "has_touch": True,
}  # fmt: skip


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        take(browser, args.address, args.folder / "page-desktop-light.png", more="&compare=true")
        take(browser, args.address, args.folder / "page-desktop-dark.png", scheme="dark", tip=60)
        take(browser, args.address, args.folder / "page-phone-light.png", device=PHONE, tip=30)
        take(
            browser, args.address, args.folder / "training-desktop-light.png", more="&tab=training"
        )
        browser.close()


def take(
    browser: Browser,
    address: str,
    path: Path,
    *,
    more: str = "",
    scheme: str = "light",
    device: dict = DESKTOP,
    tip: int | None = None,
) -> None:
    """Open the page with settings, generate a text and show the tip of a token."""
    page = browser.new_context(**device, color_scheme=scheme).new_page()
    page.goto(f"{address}/{SETTINGS}{more}")
    page.wait_for_selector("body.ready")
    if "training" in more:
        page.locator("[name=sample]").fill("2")
        page.locator("h1").click()
        page.locator("svg").first.hover()
    else:
        page.click("#go")
        page.wait_for_selector("#go:has-text('Generate')", timeout=120_000)
        page.locator(".text").evaluate_all("all => all.forEach(text => text.scrollTo(0, 0))")
    if tip is not None:
        token = page.locator(".t", has_text=re.compile(r"\w")).nth(tip)
        token.tap() if device is PHONE else token.hover()
    page.screenshot(path=path, full_page="training" in more)
    page.context.close()


if __name__ == "__main__":
    main()
