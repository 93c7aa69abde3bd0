"""The page: shared settings, three tabs, and how the server is started."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from reward_models import RewardModelError

from ..errors import ConfigError, DiffalignError
from ..evaluation.prompts import read_prompts
from ..shapes import sample_captions
from .engine import Ask, Engine
from .models import parse_model
from .runs import Runs
from .sheet import hint
from .votes import VoteBook

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
HEAD = "<h1>Compare aligned models</h1><p>Same prompt, same noise, different models. Vote blind; the votes train.</p>"
DRAWING: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "api_visibility": "private"}
# Not queued: a long line of drawings must never keep a vote waiting.
QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


@dataclass
class Demo:
    """Everything the page talks to.

    Args:
        engine: draws.
        votes: keeps votes.
        runs: training runs to look at.
        exports: folder of downloads.
        base: of LoRAs that people add.
        allow_add: whether people may name further models of this machine or the hub.
        prompts: shown first.
        steps, guidance: what the page begins with.
    """

    engine: Engine
    votes: VoteBook
    runs: Runs
    exports: Path
    base: str = "shapes"
    allow_add: bool = True
    prompts: Sequence[str] = ()
    steps: int = 12
    guidance: float = 3.0


@dataclass
class Inputs:
    """The shared settings. Events take :attr:`all`, so that Gradio hands them on as values by component."""

    prompts: gr.Textbox
    models: gr.CheckboxGroup
    seed: gr.Number
    count: gr.Number
    steps: gr.Number
    guidance: gr.Number
    side: gr.Number

    @property
    def all(self) -> set[Any]:
        """The components."""
        return set(vars(self).values())

    def ask(self, values: Mapping[Any, Any], engine: Engine) -> Ask:
        """A request from what the page holds."""
        for part in (self.seed, self.count, self.steps, self.guidance):
            if values[part] is None:
                raise ConfigError(f"Fill in a number for {part.label}.")
        lines = (values[self.prompts] or "").splitlines()
        texts = dict.fromkeys(text for line in lines if (text := " ".join(line.split())))
        chosen = [label for label in engine.labels if label in (values[self.models] or [])]
        first, count = int(values[self.seed]), min(int(values[self.count]), engine.limits.seeds + 1)
        side = int(values[self.side]) if values[self.side] else None
        seeds, steps, guidance = range(first, first + count), int(values[self.steps]), float(values[self.guidance])
        return Ask(tuple(texts), tuple(seeds), tuple(chosen), steps, guidance, side)


def note(text: str) -> None:
    """The line that says what a panel shows."""
    gr.HTML(hint(text), padding=False)


def status(words: str) -> str:
    """A line that screen readers read out when it changes."""
    return f"<div class='status' role='status' aria-live='polite'>{words}</div>"


def told(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mistakes reach the person as one sentence; the server's own failures go to its log, not to the page."""

    def sentence(error: Exception) -> gr.Error:
        if isinstance(error, (DiffalignError, RewardModelError)):
            return gr.Error(str(error), print_exception=False, title="Not done")
        if isinstance(error, gr.Error):
            return error
        log.exception("a request failed", exc_info=error)
        return gr.Error("Something went wrong on the server; its log says what.", print_exception=False, title="Sorry")

    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from fn(*args, **kwargs)
            except Exception as error:
                raise sentence(error) from error

        return stream

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise sentence(error) from error

    return call


def build(demo: Demo) -> gr.Blocks:
    """The page; start it with :func:`launch`."""
    from . import api, ui_compare, ui_runs, ui_vote

    os.environ["GRADIO_TEMP_DIR"] = str(demo.exports.parent / "served")  # Gradio's copies stay in our own folder
    with gr.Blocks(title="diffalign: compare", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        api.register(demo)  # first: the page's own events would take its names
        gr.HTML(HEAD, padding=False)
        voter = gr.BrowserState("", storage_key="diffalign-voter", secret="diffalign")
        with gr.Row(elem_classes="page"):
            with gr.Column(elem_classes="settings", scale=0, min_width=300):
                inputs, refresh = _settings(demo)
            with gr.Column(elem_classes="panels", scale=1, min_width=320), gr.Tabs():
                with gr.Tab("Compare", id="compare"):
                    ui_compare.build(demo, inputs)
                with gr.Tab("Blind vote", id="vote"):
                    show_votes, vote_outputs = ui_vote.build(demo, inputs, voter)
                with gr.Tab("Training runs", id="runs") as runs:
                    read_run, run_inputs, run_outputs = ui_runs.build(demo, inputs)
        loaded = page.load(lambda known: known or secrets.token_hex(8), voter, voter, **QUICK)
        loaded.then(show_votes, vote_outputs[0], vote_outputs[1], **QUICK)
        runs.select(read_run, run_inputs, run_outputs, **QUICK)
        page.load(refresh, inputs.models, inputs.models, **QUICK)

        def leave(request: gr.Request) -> None:
            demo.engine.sessions.close(request.session_hash)

        page.unload(leave)
    page.queue(max_size=demo.engine.limits.waiting, default_concurrency_limit=4)
    return page


def launch(
    page: gr.Blocks,
    demo: Demo,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    password: str | None = None,
) -> str:
    """Serve the page, and return at once.

    Args:
        page: from :func:`build`.
        demo: what it talks to.
        host: address to listen on.
        port: None takes the first free one from 7860.
        share: ask Gradio for a public link.
        password: asked for with the user name ``diffalign``.

    Returns:
        The address: the public one where there is one.
    """
    _, url, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=("diffalign", password) if password else None,
        auth_message="The user name is diffalign.",
        allowed_paths=[str(demo.engine.pictures), str(demo.exports)],
        max_file_size="1mb",
        state_session_capacity=demo.engine.sessions.limit,
        strict_cors=True,
        show_error=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=theme(),
        css_paths=[HERE / "style.css"],
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=["api", "settings"],
    )
    return str(public or url)


def theme() -> gr.themes.Base:
    """Fonts of the person's own system: nothing is fetched from elsewhere. Text has a contrast of 4.5 to 1 or more."""
    soft = gr.themes.Soft(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        text_size="md",
    )
    same = {
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "block_title_text_color": "*body_text_color",
        "block_title_background_fill": "transparent",
        "block_label_text_color": "*body_text_color",
        "block_label_background_fill": "*block_background_fill",
    }
    return soft.set(
        **same,
        **{f"{name}_dark": value for name, value in same.items()},
        background_fill_primary="*neutral_50",  # Soft's own; set() forgets it
        block_title_padding="0",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_border_width="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        checkbox_label_background_fill_selected="*primary_600",
    )


def _settings(demo: Demo) -> tuple[Inputs, Callable[..., Any]]:
    limits, labels = demo.engine.limits, demo.engine.labels
    prompts = list(demo.prompts) or sample_captions(3, seed=5)
    with gr.Accordion("What to draw", open=True):
        note("Each line is a prompt. Every chosen model draws it from every seed.")
        text = gr.Textbox(prompts[0], label="Prompts, one per line", lines=3, max_lines=8, elem_id="prompts")
        gr.Examples([[prompt] for prompt in prompts], [text], label="Examples", cache_examples=False)
        file = gr.UploadButton(
            "Prompts from a file (.txt, .jsonl, .json)",
            file_types=[".txt", ".jsonl", ".json"],
            size="sm",
            elem_id="prompt-file",
        )
        models = gr.CheckboxGroup(
            labels, value=labels[: limits.models], label=f"Models (at most {limits.models})", elem_id="models"
        )
        if demo.allow_add:
            with gr.Accordion("Add a model", open=False):
                name = gr.Textbox(
                    label="Name",
                    placeholder="label=folder, hub id, or npo:folder",
                    info="A pipeline, a LoRA or a training run on this machine, or an id on the hub.",
                )
                add = gr.Button("Add", size="md")
                gr.on([add.click, name.submit], told(_adder(demo)), [name, models], [models, name], **QUICK)
        with gr.Accordion("Seeds, steps, size", open=True, elem_id="numbers"):
            with gr.Row():
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=100)
                count = gr.Number(1, label="Seeds", precision=0, minimum=1, maximum=limits.seeds, min_width=100)
            with gr.Row():
                start = min(demo.steps, limits.steps)
                steps = gr.Number(start, label="Steps", precision=0, minimum=1, maximum=limits.steps, min_width=100)
                guidance = gr.Number(
                    demo.guidance, label="Guidance", minimum=0, maximum=limits.guidance, step=0.5, min_width=100
                )
            side = gr.Number(
                0,
                label="Size in pixels",
                info="0 is the model's own.",
                precision=0,
                minimum=0,
                maximum=limits.side,
                step=8,
            )

    def read(path: str) -> str:
        found = read_prompts(path)
        if len(found) > limits.prompts:
            gr.Info(f"The first {limits.prompts} of {len(found)} prompts were taken.")
        return "\n".join(found[: limits.prompts])

    file.upload(told(read), file, text, **QUICK)

    def refresh(chosen: list[str]) -> Any:
        return gr.CheckboxGroup(choices=demo.engine.labels, value=chosen)

    return Inputs(text, models, seed, count, steps, guidance, side), refresh


def _adder(demo: Demo) -> Callable[..., Any]:
    def add(name: str, chosen: list[str]) -> tuple[Any, str]:
        spec = parse_model(name, demo.base)
        demo.engine.add(spec)
        chosen = [*chosen, spec.label][: demo.engine.limits.models]
        return gr.CheckboxGroup(choices=demo.engine.labels, value=chosen), ""

    return add
