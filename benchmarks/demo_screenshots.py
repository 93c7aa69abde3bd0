"""The screenshots of docs/demo.md: the real page in a real browser, of any training runs.

    python benchmarks/demo_screenshots.py --model DPO=out/quickstart/run --runs out/quickstart

Needs the extras `demo` and `dev` and a Chromium (`CHROMIUM=/path` when it is not on the PATH).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from demo_latency import FLAGS, ROOT, serve
from playwright.sync_api import Browser, Page, sync_playwright


def open_page(browser: Browser, port: int, width: int, height: int, scheme: str) -> Page:
    """A page of the running demo."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(180_000)
    page.goto(f"http://127.0.0.1:{port}")
    page.wait_for_selector("#generate")
    return page


def generate(page: Page, pictures: int) -> None:
    """Press the button and wait until all pictures are there."""
    page.locator("#generate").click()
    page.wait_for_function(
        "n => [...document.querySelectorAll('#sheet img')].filter(i => i.complete && i.naturalWidth).length >= n",
        arg=pictures,
    )
    page.wait_for_selector("#rates table")
    page.wait_for_timeout(1500)  # pictures of the slider fade in


def vote(page: Page, rounds: int) -> None:
    """Some blind votes by the keyboard, the last of them shown."""
    page.get_by_role("tab", name="Blind vote").click()
    for number in range(rounds):
        page.locator("#vote-next").click()
        page.wait_for_selector("#ballot img")
        page.wait_for_function("!document.querySelector('#vote-left').disabled")
        page.locator("body").press("123"[number % 3])
        page.wait_for_function("document.querySelector('#vote-status').innerText.includes('Saved')")
    page.wait_for_function(f"document.querySelector('#ratings').innerText.includes('over {rounds} vote')")
    page.wait_for_timeout(1500)


def look_at_a_run(page: Page) -> None:
    """The tab of training runs, once its curves are drawn."""
    page.get_by_role("tab", name="Training runs").click()
    page.wait_for_selector("#curves svg")
    page.wait_for_timeout(1500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="[LABEL=]RUN; may be repeated")
    parser.add_argument("--runs", type=Path, required=True, help="folder of training runs")
    parser.add_argument("--images-dir", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--port", type=int, default=7990)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        process = serve(Path(folder), args.port, args.model, ["--runs", str(args.runs)])
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"), args=FLAGS
        )
        try:
            desk = open_page(browser, args.port, 1280, 1000, "light")
            generate(desk, 1 + len(args.model))
            desk.screenshot(path=args.images_dir / "demo-compare.png")
            vote(desk, 6)
            desk.screenshot(path=args.images_dir / "demo-vote.png")
            look_at_a_run(desk)
            desk.screenshot(path=args.images_dir / "demo-runs.png", full_page=True)
            phone = open_page(browser, args.port, 400, 1100, "dark")
            generate(phone, 1 + len(args.model))
            phone.locator("#sheet").scroll_into_view_if_needed()
            phone.wait_for_timeout(500)
            phone.screenshot(path=args.images_dir / "demo-phone.png")
        finally:
            process.terminate()
            browser.close()


if __name__ == "__main__":
    main()
