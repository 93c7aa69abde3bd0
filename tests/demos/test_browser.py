"""The page in a real browser, at the width of a desk and of a phone, on the embedded default; and the loop closed:
votes cast in the browser train a model that is then evaluated."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
from gradio_client import Client  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from diffalign.cli.app import app  # noqa: E402
from diffalign.data import load_preferences  # noqa: E402
from diffalign.demo import ui  # noqa: E402
from diffalign.demo.engine import Engine  # noqa: E402
from diffalign.demo.models import ModelPool, parse_model  # noqa: E402
from diffalign.demo.runs import Runs  # noqa: E402
from diffalign.demo.votes import VoteBook  # noqa: E402
from diffalign.evaluation import evaluate  # noqa: E402
from diffalign.pipelines import load_pipeline  # noqa: E402
from tests.demos.conftest import lora  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
WAIT = 90_000  # milliseconds: a busy machine is not a failure
pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH, or its path in CHROMIUM"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    models = [parse_model("shapes"), parse_model(f"tuned={lora(load_pipeline('shapes'), folder / 'tuned')}")]
    engine = Engine(folder / "out", models, pool=ModelPool(device="cpu"))
    demo = ui.Demo(engine, VoteBook(folder / "out" / "votes"), Runs(folder), folder / "out" / "exports")
    engine.warm_up()
    page = ui.build(demo)
    demo.url = ui.launch(page, demo)
    yield demo
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(demo, browser):
    """A page of a person of their own; fails on script errors and on anything fetched from elsewhere."""
    contexts, wrong = [], []

    def open_one(width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: wrong.append(r.url) if re.match(r"https?://(?!127\.0\.0\.1)", r.url) else None)
        page.goto(demo.url)
        page.wait_for_selector("#generate")
        if width < 860:  # there they begin closed
            page.wait_for_selector("#numbers button:not(.open)")
            page.locator("#numbers button").first.click()
        fill(page, "Steps", "4")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not wrong


def fill(page, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).fill(value)
    page.get_by_label(label, exact=True).press("Tab")


def readable(page) -> None:
    """Every text stands out from what is behind it, and every picture and control has words."""
    page.evaluate("document.getAnimations().forEach(a => a instanceof CSSTransition && a.finish())")
    assert page.evaluate(CONTRAST) == []
    assert page.locator("img:not([alt]):visible, img[alt='']:visible").count() == 0
    assert page.locator("fieldset:not([aria-label]):visible").count() == 0


def next_pair(page) -> None:
    page.locator("#vote-next").click()
    page.wait_for_selector("#ballot img")
    page.wait_for_function("!document.querySelector('#vote-left').disabled")


def saved(page) -> None:
    page.wait_for_function("document.querySelector('#vote-status').innerText.includes('Saved')")


def votes_shown(page) -> int:
    page.wait_for_function("/over \\d+ vote/.test(document.querySelector('#ratings').innerText)")
    return int(re.search(r"over (\d+) vote", page.locator("#ratings").inner_text())[1])


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_person_compares_votes_reloads_and_downloads(demo, open_page, width, scheme):
    page = open_page(width, scheme)
    page.locator("#generate").click()
    page.wait_for_function("[...document.querySelectorAll('#sheet img')].filter(i => i.naturalWidth).length == 2")
    words = [image.get_attribute("alt") for image in page.locator("#sheet img").all()]
    assert words[0].startswith("shapes, seed 0: ") and words[1].startswith("tuned, seed 0: ")
    page.locator("#slider").scroll_into_view_if_needed()
    page.wait_for_selector("#slider img[alt]:not([alt=''])")  # they load when they come into view
    said = [image.get_attribute("alt") for image in page.locator("#slider img").all()]
    assert [words.split(":")[0] for words in said] == ["shapes", "tuned"] and said[0].endswith("seed 0")
    handle = page.locator("#slider [data-testid=slider]")
    seen = [handle.get_attribute("style")]
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 60, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    seen.append(handle.get_attribute("style"))
    page.locator("#slide-bar input[type=range]").press("ArrowRight")
    page.wait_for_function(f"document.querySelector('#slider [data-testid=slider]').style.cssText != {seen[-1]!r}")
    assert seen[0] != seen[1]
    page.wait_for_selector("#rates table")
    assert "win rate" in page.locator("#rates").inner_text()
    page.get_by_label("Seed strip").check()
    page.wait_for_selector("#sheet .strip")
    readable(page)

    already = len(demo.votes.votes())
    page.get_by_role("tab", name="Blind vote").click()
    next_pair(page)
    hidden = page.locator("#ballot").inner_text()
    assert "tuned" not in hidden and "shapes" not in hidden
    page.locator("body").press("2")
    saved(page)
    readable(page)
    assert "tuned" in page.locator("#ballot").inner_text()
    assert votes_shown(page) == already + 1 == len(demo.votes.votes())
    next_pair(page)
    page.locator("#vote-tie").click()
    saved(page)
    page.wait_for_function(f"document.querySelector('#ratings').innerText.includes('over {already + 2} votes')")
    page.reload()
    page.wait_for_selector("#generate")
    page.get_by_role("tab", name="Blind vote").click()
    assert votes_shown(page) == already + 2
    page.get_by_label("Only my votes").check()
    page.wait_for_function("document.querySelector('#ratings').innerText.includes('over 2 votes')")
    page.get_by_text("Download the votes").click()
    page.locator("#export").click()
    with page.expect_download() as download:
        page.locator("#exported a[download]").first.click()
    assert len(load_preferences(download.value.path().rename(Path(download.value.path()).with_suffix(".parquet")))) > 0
    assert page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)") <= width


def test_typing_a_number_does_not_vote(open_page):
    page = open_page()
    page.get_by_role("tab", name="Blind vote").click()
    next_pair(page)
    page.locator("#prompts textarea").press("1")
    page.get_by_label("Keys 1 2 3 4 vote").uncheck()
    page.locator("body").press("1")
    time.sleep(1)
    assert "Saved" not in page.locator("#vote-status").inner_text()


def test_bad_input_is_one_sentence_on_the_page(open_page):
    page = open_page()
    page.locator("#prompts textarea").fill("x" * 1500)
    page.locator("#generate").click()
    page.wait_for_selector(".toast-body")
    assert "A prompt may have 1000 letters" in page.locator(".toast-body").inner_text()


def test_closing_the_tab_frees_the_worker_and_people_do_not_mix(demo, open_page):
    first, second = open_page(), open_page()
    fill(first, "Steps", "100")
    fill(first, "Seeds", "8")
    before = len(list(demo.engine.pictures.glob("*.png")))
    first.locator("#generate").click()
    wait_until(lambda: demo.engine.worker.busy)
    first.close()
    second.locator("#generate").click()
    second.wait_for_selector("#sheet img")
    second.wait_for_function("document.querySelector('#status').innerText.includes('2 of 2')")
    wait_until(lambda: not demo.engine.worker.busy)
    time.sleep(1)
    assert not demo.engine.worker.busy  # nor is it taken again
    assert len(list(demo.engine.pictures.glob("*.png"))) - before < 16  # what the first alone had asked for


def wait_until(condition) -> None:
    deadline = time.monotonic() + WAIT / 1000
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_the_page_works_by_keyboard_alone(open_page):
    """The Tab key leads from the prompts to every part, Enter presses, numbers vote."""
    page = open_page()
    page.locator("#prompts textarea").focus()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.id || e.ariaLabel || e.name)(document.activeElement)"))
        if reached[-1] == "generate":
            break
    assert {"shapes", "tuned", "First seed", "Steps", "generate"} <= set(reached), reached
    outline = "getComputedStyle(document.activeElement).outlineWidth"
    assert page.evaluate(outline) == "3px"
    page.keyboard.press("Enter")
    page.wait_for_function("[...document.querySelectorAll('#sheet img')].filter(i => i.naturalWidth).length == 2")
    page.get_by_role("tab", name="Compare").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote-next")
    page.locator("body").press("n")
    page.wait_for_selector("#ballot img")
    page.wait_for_function("!document.querySelector('#vote-left').disabled")
    page.locator("body").press("4")
    saved(page)
    assert "both bad" in page.locator("#vote-status").inner_text()


def test_a_run_is_read_when_its_tab_is_opened(demo, open_page):
    run = demo.runs.root / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 7, "loss": 0.5}\n')
    page = open_page(400, "dark")
    assert page.locator("#curves svg").count() == 0
    page.get_by_role("tab", name="Training runs").click()
    page.wait_for_selector("#curves svg")
    assert page.get_by_role("img", name="Loss: loss from 1 to 0.5 at step 7").is_visible()
    assert "no validation pictures" in page.locator("#grid").inner_text()
    readable(page)
    assert page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)") <= 400


def test_two_hundred_requests_are_served_or_sent_away_within_bounds(demo):
    clients = [Client(demo.url, verbose=False, httpx_kwargs={"timeout": 120}) for _ in range(4)]
    served, lock = [], threading.Lock()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def ask(number: int) -> None:
        try:
            clients[number % 4].predict(["a red circle"], ["shapes"], [0], steps=1, guidance=1.0, api_name="/compare")
            answer = "served"
        except Exception as error:  # noqa: BLE001 (the queue is full: gradio_client has several words for it)
            answer = type(error).__name__
        with lock:
            served.append(answer)

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(200)))
    assert len(served) == 200 and served.count("served") >= 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024  # KiB
    assert len(demo.engine.sessions) <= demo.engine.sessions.limit
    for client in clients:
        client.close()


def test_votes_cast_in_the_browser_train_a_model_that_is_evaluated(demo, open_page, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Blind vote").click()
    for key in ("1", "2"):
        next_pair(page)
        page.locator("body").press(key)
        saved(page)
    run = tmp_path / "run"
    settings = {
        "dataset": demo.votes.folder,
        "output_dir": run,
        "cache_dir": tmp_path / "cache",
        "max_steps": 2,
        "batch_size": 2,
        "warmup_steps": 0,
        "adapter": "lora",
        "precompute_reference": "null",
        "min_margin": 0.0,
        "pairs": "best_worst",
        "progress_bar": "false",
    }
    result = CliRunner().invoke(app, ["train", "shapes-dpo", *(f"{key}={value}" for key, value in settings.items())])
    assert result.exit_code == 0, result.output
    report = evaluate("shapes", run, ["a red circle"], output_dir=tmp_path / "report", seeds=1, steps=2)
    assert json.loads((tmp_path / "report" / "report.json").read_text())["prompts"] == report["prompts"]
