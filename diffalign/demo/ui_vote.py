"""The tab of blind votes, and what they say so far."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import ConfigError
from ..evaluation.ratings import duels, rate_models
from .charts import rating_chart
from .session import StoppedError
from .sheet import render_ballot, render_ratings
from .ui import DRAWING, QUICK, Demo, Inputs, note, status, told
from .votes import CHOICES, draw_ballot

KEPT_EXPORTS = 4
BUTTONS = {
    "left": ("Left is better (1)", "vote-left"),
    "right": ("Right is better (2)", "vote-right"),
    "tie": ("Tie (3)", "vote-tie"),
    "both bad": ("Both bad (4)", "vote-bad"),
}
LAYOUTS = {"Our preference table": "preferences", "Pick-a-Pic columns": "pickapic"}


def build(demo: Demo, inputs: Inputs, voter: gr.BrowserState) -> tuple[Callable[..., Any], tuple[list[Any], list[Any]]]:
    """Lay the tab out and wire it; returns what shows the votes when the page opens, with its inputs and outputs."""
    note(
        "Two of the chosen models drew one of the prompts from the same noise. Their sides are shuffled and their "
        "names hidden until you vote. Each vote is a row that <code>diffalign train</code> can learn from."
    )
    with gr.Row(elem_classes="actions"):
        again = gr.Button("Next pair (N)", variant="primary", elem_id="vote-next", min_width=180)
        gr.Checkbox(
            True,
            label="Keys 1 2 3 4 vote, N draws the next pair",
            elem_id="vote-keys",
            min_width=310,
            interactive=True,
            container=False,
        )
    said = gr.HTML(status("No pair yet: press Next pair."), padding=False, elem_id="vote-status")
    pair = gr.HTML(padding=False, elem_id="ballot", label="Pair")
    waiting = gr.State("")
    with gr.Row(elem_classes="votes"):
        buttons = {
            choice: gr.Button(text, elem_id=name, min_width=150, interactive=False)
            for choice, (text, name) in BUTTONS.items()
        }
    note(
        "What the votes say so far: Bradley-Terry strengths on the Elo scale with 95 % intervals. Intervals that "
        "overlap much mean that more votes are needed."
    )
    mine = gr.Checkbox(False, label="Only my votes", elem_id="only-mine", container=False)
    with gr.Row(elem_classes="halves"):
        ratings = gr.HTML(padding=False, elem_id="ratings", min_width=300)
        chart = gr.HTML(padding=False, elem_id="rating-chart", min_width=300)
    with gr.Accordion("Download the votes", open=False, elem_id="downloads"):
        layout = gr.Radio(list(LAYOUTS), value=next(iter(LAYOUTS)), label="Columns")
        make = gr.Button("Make the files", elem_id="export", size="md")
        files = gr.File(label="Parquet files", file_count="multiple", interactive=False, elem_id="exported")

    def summary(only_mine: bool, voter: str) -> tuple[str, str]:
        games = demo.votes.games(voter if only_mine else None, list(demo.engine.specs.values()))
        rated = rate_models(games)
        return render_ratings(rated, duels(games), len(games)), rating_chart(rated)

    @told
    def draw(
        values: dict[Any, Any],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio passes it)
    ) -> Iterator[Any]:
        session = demo.engine.sessions[request.session_hash]
        yield status("Drawing a pair ..."), "", "", *_enabled(False)
        try:
            ask = inputs.ask(values | {inputs.count: 1}, demo.engine)  # the ballot draws its own seed
            ballot = draw_ballot(demo.engine, ask, session, lambda share, text: progress(share, desc=text))
        except StoppedError:
            yield status("Stopped."), "", "", *_enabled(False)
            return
        yield status("Which one is better?"), render_ballot(ballot), ballot.id, *_enabled(True)

    def voting(choice: str) -> Callable[..., Any]:
        @told
        def vote(ballot_id: str, voter: str, only_mine: bool, request: gr.Request) -> Any:
            session = demo.engine.sessions[request.session_hash]
            ballot = demo.votes.cast(session, ballot_id, choice, voter)
            words = status(f"Saved: {choice}. Press N for the next pair.")
            return words, render_ballot(ballot, choice), "", *_enabled(False), *summary(only_mine, voter)

        return vote

    @told
    def export(layout: str) -> list[str]:
        return [str(file) for file in export_votes(demo, LAYOUTS.get(layout, layout))]

    drawn = [said, pair, waiting, *buttons.values()]
    again.click(draw, inputs.all, drawn, show_progress_on=[said], **DRAWING)
    for choice, button in buttons.items():
        button.click(voting(choice), [waiting, voter, mine], [*drawn, ratings, chart], **QUICK)
    mine.change(summary, [mine, voter], [ratings, chart], **QUICK)
    make.click(export, layout, files, **QUICK)
    return summary, ([mine, voter], [ratings, chart])


def export_votes(demo: Demo, layout: str) -> list[Path]:
    """Write all votes into a new folder of downloads; only the last few such folders are kept."""
    if layout not in LAYOUTS.values():
        raise ConfigError(f"Expected one of {', '.join(LAYOUTS.values())}, got {layout!r}.")
    written = demo.votes.export(demo.exports / f"{time.time_ns():016x}-{layout}", layout)
    for old in sorted(demo.exports.iterdir())[:-KEPT_EXPORTS]:
        shutil.rmtree(old, ignore_errors=True)
    return written


def _enabled(on: bool) -> list[Any]:
    return [gr.Button(interactive=on) for _ in CHOICES]
