"""How long a person waits for the first and the second picture of the demo, from the click in a real browser.

    python benchmarks/demo_latency.py

Needs the extras `demo` and `dev` and a Chromium (`CHROMIUM=/path` when it is not on the PATH). The server is a process
of its own with the embedded model, as `demos/compare.py` starts it; the first click asks for one picture of a fresh
server, the second for one of another seed. `with_lora` compares the base with a LoRA: two pictures a click. Seconds
depend on what else the machine does; the CPU seconds of the server (Linux) do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from peft import LoraConfig
from playwright.sync_api import Page, sync_playwright

from diffalign.pipelines import adapter_for, load_pipeline, save_lora

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def serve(folder: Path, port: int, models: list[str], options: Sequence[str] = ()) -> subprocess.Popen:
    """Start the demo and wait until it answers."""
    command = [
        sys.executable,
        str(ROOT / "demos" / "compare.py"),
        "--output",
        str(folder),
        "--port",
        str(port),
        *options,
    ]
    for model in models:
        command += ["--model", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        if " Open " in line:
            return process
    raise SystemExit("the demo did not start")


def cpu_seconds(process: subprocess.Popen) -> float:
    """What all threads of a process have used so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_pictures(page: Page, count: int, seed: int) -> float:
    """Seconds from the click to so many decoded pictures of this seed."""
    page.get_by_label("First seed").fill(str(seed))
    page.get_by_label("First seed").press("Tab")
    began = time.perf_counter()
    page.locator("#generate").click()
    page.wait_for_function(
        "([n, seed]) => [...document.querySelectorAll('#sheet img')].filter(i => i.complete && i.naturalWidth"
        " && i.alt.includes(`seed ${seed}:`)).length >= n",
        arg=[count, seed],
        polling=20,
        timeout=120_000,
    )
    return time.perf_counter() - began


def measure(name: str, models: list[str], rounds: int, port: int) -> dict[str, object]:
    """First and later clicks on fresh servers."""
    first, later, used = [], [], []
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                process = serve(Path(folder), port + number, models)
                try:
                    page = browser.new_page()
                    page.goto(f"http://127.0.0.1:{port + number}")
                    page.wait_for_selector("#generate")
                    count = 1 + len(models)
                    first.append(wait_for_pictures(page, count, 1))
                    for seed in (2, 3, 4):
                        began = cpu_seconds(process)
                        later.append(wait_for_pictures(page, count, seed))
                        page.wait_for_timeout(1000)  # what the click still causes counts too
                        used.append(cpu_seconds(process) - began)
                finally:
                    process.terminate()
                    process.wait(30)
        browser.close()
    return {
        "case": name,
        "pictures_per_click": 1 + len(models),
        "first_click_seconds": [round(value, 2) for value in first],
        "later_click_seconds": [round(value, 2) for value in later],
        "later_click_server_cpu_seconds": [round(value, 2) for value in used],
        "median_first": round(statistics.median(first), 2),
        "median_later": round(statistics.median(later), 2),
    }


def make_lora(folder: Path) -> Path:
    """A LoRA of the embedded model that changes its pictures a little."""
    pipeline = load_pipeline("shapes")
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    save_lora(adapter_for(pipeline), folder)
    return folder


def main() -> None:
    """Measure both cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=7960)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "demo_latency.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lora = make_lora(Path(folder) / "lora")
        cases = [
            measure("base", [], options.rounds, options.port),
            measure("with_lora", [f"lora={lora}"], options.rounds, options.port + 20),
        ]
    load = os.getloadavg()[0]
    report = {"date": str(date.today()), "cores": os.cpu_count(), "load_average": round(load, 1), "steps": 12}
    options.output.write_text(json.dumps({**report, "cases": cases}, indent=2) + "\n")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
