"""The tab of training runs: curves, validation pictures, settings, and two checkpoints side by side."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from ..errors import ConfigError
from .charts import curve_charts
from .engine import Picture
from .runs import START
from .session import StoppedError
from .sheet import hint, render_sheet, url_of
from .ui import DRAWING, QUICK, Demo, Inputs, note, status, told


def build(demo: Demo, inputs: Inputs) -> tuple[Callable[..., Any], list[Any], list[Any]]:
    """Lay the tab out and wire it; returns what reads a run when the tab is opened, with its inputs and outputs."""
    names = demo.runs.names()
    note(
        "A training run from the inside: whether it learns (accuracy above 0.5, margin rising), whether it breaks "
        "things (the winner's error must not rise), and what its pictures looked like on the way."
    )
    with gr.Row(elem_classes="bottoms"):
        run = gr.Dropdown(
            names, value=names[0] if names else None, label=f"Run (in {demo.runs.root.name})", elem_id="run"
        )
        again = gr.Button("Read again", elem_id="read-run", min_width=150, scale=0, size="md")
    verdict = gr.HTML(padding=False, elem_id="verdict")
    curves = gr.HTML(padding=False, elem_id="curves", label="Curves")
    with gr.Column(visible=False) as details:
        with gr.Accordion("Validation pictures", open=True):
            note("The base on the left and the model in training on the right, from the same noise at every step.")
            step = gr.Dropdown([], label="Optimizer step", elem_id="grid-step")
            grid = gr.HTML(padding=False, elem_id="grid")
        with gr.Accordion("Settings of the run", open=False):
            settings = gr.Code(language="yaml", label="Resolved settings", interactive=False, elem_id="run-settings")
        with gr.Accordion("Compare two checkpoints", open=True):
            note("Drawn now, with the prompts, seeds and numbers of “What to draw”.")
            with gr.Row(elem_classes="bottoms"):
                first = gr.Dropdown([], label="First", elem_id="checkpoint-first", min_width=140)
                second = gr.Dropdown([], label="Second", elem_id="checkpoint-second", min_width=140)
                go = gr.Button(
                    "Compare", variant="primary", elem_id="compare-checkpoints", min_width=150, scale=0, size="md"
                )
            said = gr.HTML(status(""), padding=False, elem_id="checkpoint-status")
            sheet = gr.HTML(padding=False, elem_id="checkpoint-sheet")

    @told
    def read(name: str | None) -> Any:
        known = demo.runs.names()
        if not (name := name or next(iter(known), None)):
            empty = hint(
                f"No training run was found in {html.escape(demo.runs.root.name)}. "
                "Train one, or start the demo with <code>--runs FOLDER</code>."
            )
            return [gr.Dropdown(choices=[], value=None), empty, "", *[gr.skip()] * 5, gr.Column(visible=False)]
        chosen = demo.runs[name]
        grids, points = [str(step) for step in chosen.grids()], [START, *chosen.checkpoints()]
        return [
            gr.Dropdown(choices=known, value=name),
            hint(html.escape(chosen.verdict())),
            f"<div class='curves'>{curve_charts(chosen.curves())}</div>",
            gr.Dropdown(choices=grids, value=grids[-1] if grids else None, visible=bool(grids)),
            show_grid(name, grids[-1] if grids else None),
            chosen.settings(),
            gr.Dropdown(choices=points, value=START),
            gr.Dropdown(choices=points, value=points[-1]),
            gr.Column(visible=True),
        ]

    def open_tab(name: str | None, shown: str) -> Any:
        """Read when the tab is opened first: nobody else should wait for it, and later it stays as it was left."""
        return [gr.skip()] * len(outputs) if shown else read(name)

    @told
    def show_grid(name: str, step: str | None) -> str:
        if step is None:
            return hint("The run made no validation pictures (validate_every in its settings).")
        grids = demo.runs[name].grids()
        if not step.isdigit() or int(step) not in grids:
            raise ConfigError(f"{name} has no validation pictures of step {step}.")
        copy = demo.engine.save(grids[int(step)].read_bytes())  # only the server's own folder is served
        words = html.escape(f"Validation pictures of {name} at step {step}: base left, trained right", quote=True)
        return f"<div class='scroll' tabindex='0'><img src='{url_of(copy)}' alt='{words}'></div>"

    @told
    def compare(values: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        points = values[first], values[second]
        if points[0] == points[1]:
            raise ConfigError("Choose two different checkpoints.")
        specs = demo.runs[values[run]].specs(points, demo.base)
        ask = replace(inputs.ask(values, demo.engine), models=points)
        pictures: list[Picture] = []
        session = demo.engine.sessions[request.session_hash]
        yield status("Drawing ..."), ""
        try:
            for part in demo.engine.compare(ask, session, specs=specs, tally=False):
                pictures += part
                yield status(f"{len(pictures)} of {2 * len(ask.cells)} pictures"), render_sheet(pictures, ask)
        except StoppedError:
            yield status("Stopped."), render_sheet(pictures, ask)

    outputs = [run, verdict, curves, step, grid, settings, first, second, details]
    run.input(read, run, outputs, **QUICK)
    again.click(read, run, outputs, **QUICK)
    step.input(show_grid, [run, step], grid, **QUICK)
    go.click(compare, inputs.all | {run, first, second}, [said, sheet], show_progress_on=[said], **DRAWING)
    return open_tab, [run, verdict], outputs
