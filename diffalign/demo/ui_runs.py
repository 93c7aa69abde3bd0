"""The tab of training runs: curves, validation pictures, settings, and two checkpoints side by side."""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from ..data.images import content_hash
from ..errors import ConfigError
from .charts import curve_charts
from .engine import Picture
from .models import ModelSpec, parse_model
from .runs import Run
from .session import StoppedError
from .sheet import hint, render_sheet, url_of
from .ui import DRAWING, QUICK, Demo, Inputs, note, told

START = "start"  # the base model, before the first step


def build(demo: Demo, inputs: Inputs) -> tuple[Callable[..., Any], gr.Dropdown, list[Any]]:
    """Lay the tab out and wire it; returns what reads a run, with its input and outputs."""
    names = demo.runs.names()
    note(
        "A training run from the inside: whether it learns (accuracy above 0.5, margin rising), whether it breaks "
        "things (the winner's error must not rise), and what its pictures looked like on the way."
    )
    with gr.Row(elem_classes="bottoms"):
        run = gr.Dropdown(
            names, value=names[0] if names else None, label=f"Run (in {demo.runs.root.name})", elem_id="run"
        )
        again = gr.Button("Read again", elem_id="read-run", min_width=120, scale=0)
    verdict = gr.HTML(padding=False, elem_id="verdict")
    curves = gr.HTML(padding=False, elem_id="curves", label="Curves")
    with gr.Accordion("Validation pictures", open=True):
        note("The base on the left and the model in training on the right, from the same noise at every step.")
        step = gr.Dropdown([], label="Optimizer step", elem_id="grid-step")
        grid = gr.HTML(padding=False, elem_id="grid")
    with gr.Accordion("Settings of the run", open=False):
        settings = gr.Code(language="yaml", label="Resolved settings", interactive=False, elem_id="run-settings")
    with gr.Accordion("Compare two checkpoints", open=True):
        note("Drawn now, with the prompts, seeds and settings from the top of the page.")
        with gr.Row(elem_classes="bottoms"):
            first = gr.Dropdown([], label="First", elem_id="checkpoint-first", min_width=140)
            second = gr.Dropdown([], label="Second", elem_id="checkpoint-second", min_width=140)
            go = gr.Button("Compare", variant="primary", elem_id="compare-checkpoints", min_width=140, scale=0)
        status = gr.HTML(_said(""), padding=False, elem_id="checkpoint-status")
        sheet = gr.HTML(padding=False, elem_id="checkpoint-sheet")

    @told
    def read(name: str | None) -> Any:
        choices = gr.Dropdown(choices=demo.runs.names(), value=name)
        if not name:
            empty = hint(f"No training run was found in {demo.runs.root.name}: start the demo with --runs FOLDER.")
            return choices, empty, "", gr.Dropdown(choices=[], value=None), "", "", gr.Dropdown(), gr.Dropdown()
        chosen = demo.runs[name]
        grids, points = [str(step) for step in chosen.grids()], [START, *chosen.checkpoints()]
        return (
            choices,
            hint(html.escape(chosen.verdict())),
            f"<div class='curves'>{curve_charts(chosen.curves())}</div>",
            gr.Dropdown(choices=grids, value=grids[-1] if grids else None),
            show_grid(name, grids[-1] if grids else None),
            chosen.settings(),
            gr.Dropdown(choices=points, value=points[-2] if len(points) > 1 else START),
            gr.Dropdown(choices=points, value=points[-1]),
        )

    @told
    def show_grid(name: str, step: str | None) -> str:
        if step is None:
            return hint("The run made no validation pictures (validate_every in its settings).")
        grids = demo.runs[name].grids()
        if not step.isdigit() or int(step) not in grids:
            raise ConfigError(f"{name} has no validation pictures of step {step}.")
        data = grids[int(step)].read_bytes()
        copy = demo.engine.pictures / f"{content_hash(data)}.png"  # only the server's own folder is served
        if not copy.exists():
            shutil.copyfile(grids[int(step)], copy)
        words = html.escape(f"Validation pictures of {name} at step {step}: base left, trained right", quote=True)
        return f"<div class='scroll' tabindex='0'><img src='{url_of(copy)}' alt='{words}'></div>"

    @told
    def compare(
        name: str,
        first: str,
        second: str,
        prompts: str,
        models: list[str],
        seed: float,
        count: float,
        steps: float,
        guidance: float,
        side: float,
        request: gr.Request,
    ) -> Iterator[Any]:
        chosen = demo.runs[name]
        if first == second:
            raise ConfigError("Choose two different checkpoints.")
        specs = checkpoint_specs(chosen, (first, second), demo.base)
        ask = replace(demo.ask(prompts, models, seed, count, steps, guidance, side), models=(first, second))
        pictures: list[Picture] = []
        session = demo.engine.sessions[request.session_hash]
        yield _said("Drawing ..."), ""
        try:
            for part in demo.engine.compare(ask, session, specs=specs, tally=False):
                pictures += part
                yield _said(f"{len(pictures)} of {2 * len(ask.cells)} pictures"), render_sheet(pictures, ask)
        except StoppedError:
            yield _said("Stopped."), render_sheet(pictures, ask)

    outputs = [run, verdict, curves, step, grid, settings, first, second]
    run.input(read, run, outputs, **QUICK)
    again.click(read, run, outputs, **QUICK)
    step.input(show_grid, [run, step], grid, **QUICK)
    go.click(compare, [run, first, second, *inputs.all], [status, sheet], show_progress_on=[status], **DRAWING)
    return read, run, outputs


def checkpoint_specs(run: Run, points: Sequence[str], base: str) -> dict[str, ModelSpec]:
    """Checkpoints of a run, or its start, as models called like them."""
    found = {point: run.spec(point, base) for point in points if point != START}
    origin = next((spec.base for spec in found.values()), base)
    specs = {**found, START: parse_model(origin)}
    return {point: replace(specs[point], label=point) for point in points}


def _said(words: str) -> str:
    return f"<div class='status' role='status' aria-live='polite'>{words}</div>"
