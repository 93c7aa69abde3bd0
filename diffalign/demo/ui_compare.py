"""The tab that compares: pictures with scores, a slider, and running win rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from .charts import rate_chart
from .engine import Ask, Picture
from .session import Session, StoppedError
from .sheet import VIEWS, hint, render_sheet, render_standings
from .ui import DRAWING, QUICK, Demo, Inputs, note, status, told

#: Gradio's slider gives its pictures no words, and brings them when they come into view.
_DESCRIBE = """(left, right, cell) => {
  const describe = (tries) => {
    const pictures = document.querySelectorAll("#slider img");
    [left, right].forEach((model, i) => { if (pictures[i]) pictures[i].alt = `${model}: ${cell}`; });
    if (pictures.length < 2 && tries) setTimeout(describe, 200, tries - 1);
  };
  describe(100);
}"""
_RATES = hint(
    "Win rates so far on this page: how often a model scores above the first one on the same prompt and seed. "
    "An interval that holds 0.5 means: not decided."
)
Drawn = tuple[Ask, list[Picture]] | None


def build(demo: Demo, inputs: Inputs) -> None:
    """Lay the tab out and wire it."""
    scored = "Under each picture: scores of the reward models; ★ and a green frame mark the best."
    note(
        "Models of one family start from the same noise, so what differs is what training changed. "
        + (scored if demo.engine.scorers else "No reward model is loaded (<code>--score</code>): judge for yourself.")
    )
    with gr.Row(elem_classes="actions"):
        go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=140, scale=2)
        stop = gr.Button("Cancel", elem_id="cancel", min_width=100, scale=1)
        view = gr.Radio(VIEWS, value=VIEWS[0], label="View", elem_id="view", min_width=230, container=False, scale=2)
    said = gr.HTML(status("Nothing drawn yet: press Generate."), padding=False, elem_id="status")
    drawn = gr.State(None)
    sheet = gr.HTML(padding=False, elem_id="sheet", label="Pictures")
    with gr.Accordion("Slide between two models", open=True, visible=False) as sliding:
        note("One picture over another: drag the handle, or move the bar below it, to see where they differ.")
        with gr.Row():
            left = gr.Dropdown([], label="Left", elem_id="slide-left", min_width=140)
            right = gr.Dropdown([], label="Right", elem_id="slide-right", min_width=140)
            cell = gr.Dropdown([], label="Prompt and seed", elem_id="slide-cell", min_width=200)
        slider = gr.ImageSlider(
            label="Left and right model",
            show_label=False,
            type="filepath",
            max_height=420,
            elem_id="slider",
            buttons=[],
        )
        bar = gr.Slider(0, 100, 50, step=5, label="Handle (arrow keys move it)", elem_id="slide-bar")
    with gr.Row(elem_classes="halves"):
        rates = gr.HTML(padding=False, elem_id="rates", min_width=300)
        chart = gr.HTML(padding=False, elem_id="rate-chart", min_width=300)

    @told
    def generate(
        values: dict[Any, Any],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio passes it)
    ) -> Iterator[Any]:
        session = demo.engine.sessions[request.session_hash]
        ask, chosen = inputs.ask(values, demo.engine), values[view]
        pictures: list[Picture] = []

        def page(words: str) -> tuple[Any, ...]:
            return status(words), render_sheet(pictures, ask, chosen), (ask, pictures), *_tables(demo, session)

        progress(0.0, desc="waiting for the models")
        try:
            for part in demo.engine.compare(ask, session, lambda share, text: progress(share, desc=text)):
                pictures += part
                yield page(f"{len(pictures)} of {len(ask.cells) * len(ask.models)} pictures")
        except StoppedError:
            yield page(f"Stopped after {len(pictures)} pictures.")

    def cancel(request: gr.Request) -> str:
        demo.engine.sessions[request.session_hash].stop()
        return status("Cancelled.")

    def show(drawn: Drawn, view: str) -> str:
        return render_sheet(drawn[1], drawn[0], view) if drawn else ""

    outputs = [said, sheet, drawn, rates, chart]
    run = go.click(generate, inputs.all | {view}, outputs, show_progress_on=[said], **DRAWING)
    run.then(_choices, [drawn, left, right], [sliding, left, right, cell], **QUICK).then(
        _slide, [drawn, left, right, cell], slider, **QUICK
    )
    stop.click(cancel, None, said, cancels=[run], queue=False, api_visibility="private")
    view.change(show, [drawn, view], sheet, **QUICK)
    bar.input(lambda position: gr.ImageSlider(slider_position=position), bar, slider, **QUICK)
    slider.change(None, [left, right, cell], js=_DESCRIBE, api_visibility="private")
    for choice in (left, right, cell):
        choice.input(_slide, [drawn, left, right, cell], slider, **QUICK)


def _tables(demo: Demo, session: Session) -> tuple[str, str]:
    """Table and chart of every score that gave numbers."""
    tally = session.tally
    drawn = tally.models()
    labels = [label for label in demo.engine.labels if label in drawn]  # the first that was drawn is what counts
    standings = {score: tally.standings(score, labels) for score in tally.scores()}
    shown = {score: [s for s in rows if s.rate.mean == s.rate.mean] for score, rows in standings.items()}
    tables = "".join(render_standings(rows, score) for score, rows in shown.items() if rows)
    first = next((score for score, rows in shown.items() if rows), None)
    return (_RATES + tables, rate_chart(shown[first], first)) if first else ("", "")


def _choices(drawn: Drawn, left: str, right: str) -> tuple[Any, Any, Any, Any]:
    """What the slider can show of the pictures that are there."""
    if not drawn or not drawn[1]:
        return gr.Accordion(visible=False), gr.Dropdown(), gr.Dropdown(), gr.Dropdown()
    ask, pictures = drawn
    models = [model for model in ask.models if any(picture.model == model for picture in pictures)]
    names = _cell_names(ask)
    first = left if left in models else models[0]
    second = right if right in models and right != first else next((m for m in models if m != first), first)
    return (
        gr.Accordion(visible=len(models) > 1),
        gr.Dropdown(choices=models, value=first),
        gr.Dropdown(choices=models, value=second),
        gr.Dropdown(choices=names, value=names[0]),
    )


def _cell_names(ask: Ask) -> list[str]:
    return [f"{prompt} · seed {seed}" for prompt, seed in ask.cells]


def _slide(drawn: Drawn, left: str, right: str, cell: str) -> tuple[str, str] | None:
    if not drawn or cell not in (names := _cell_names(drawn[0])):
        return None
    prompt, seed = drawn[0].cells[names.index(cell)]
    paths = [_path(drawn[1], prompt, seed, model) for model in (left, right)]
    return (paths[0], paths[1]) if paths[0] and paths[1] else None


def _path(pictures: Sequence[Picture], prompt: str, seed: int, model: str) -> str | None:
    found = (p for p in pictures if (p.prompt, p.seed, p.model) == (prompt, seed, model))
    return next((str(picture.path) for picture in found if picture.path.exists()), None)
