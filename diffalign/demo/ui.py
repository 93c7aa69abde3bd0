"""The page: shared settings, three tabs, and how the server is started."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
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
MAX_ADDED_MODELS = 16
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
    """

    engine: Engine
    votes: VoteBook
    runs: Runs
    exports: Path
    base: str = "shapes"
    allow_add: bool = True
    prompts: Sequence[str] = ()

    def ask(
        self, prompts: str, models: Sequence[str], seed: float, count: float, steps: float, guidance: float, side: float
    ) -> Ask:
        """A request from what the page holds."""
        numbers = {"first seed": seed, "seeds": count, "steps": steps, "guidance": guidance}
        for name, value in numbers.items():
            if value is None:
                raise ConfigError(f"Fill in a number for {name}.")
        texts = dict.fromkeys(text for line in (prompts or "").splitlines() if (text := " ".join(line.split())))
        chosen = [label for label in self.engine.labels if label in (models or [])]
        seeds = range(int(seed), int(seed) + min(int(count), self.engine.limits.seeds + 1))
        return Ask(tuple(texts), tuple(seeds), tuple(chosen), int(steps), float(guidance), int(side) if side else None)


@dataclass
class Inputs:
    """The shared settings, in the order in which :meth:`Demo.ask` takes them."""

    prompts: gr.Textbox
    models: gr.CheckboxGroup
    seed: gr.Number
    count: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    side: gr.Number

    @property
    def all(self) -> list[Any]:
        """The components."""
        return [self.prompts, self.models, self.seed, self.count, self.steps, self.guidance, self.side]


def note(text: str) -> None:
    """The line that says what a panel shows."""
    gr.HTML(hint(text), padding=False)


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
        gr.Markdown("# Compare aligned models\nSame prompt, same noise, different models. Vote blind; the votes train.")
        voter = gr.BrowserState("", storage_key="diffalign-voter", secret="diffalign")
        inputs, refresh = _settings(demo)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                ui_compare.build(demo, inputs)
            with gr.Tab("Blind vote", id="vote"):
                show_votes, vote_outputs = ui_vote.build(demo, inputs, voter)
            with gr.Tab("Training runs", id="runs"):
                read_run, run, run_outputs = ui_runs.build(demo, inputs)
        loaded = page.load(lambda known: known or secrets.token_hex(8), voter, voter, **QUICK)
        loaded.then(show_votes, vote_outputs[0], vote_outputs[1], **QUICK)
        page.load(read_run, run, run_outputs, **QUICK)
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
        head=f"<script>{(HERE / 'keys.js').read_text(encoding='utf-8')}</script>",
        footer_links=["api", "settings"],
    )
    return str(public or url)


def theme() -> gr.themes.Base:
    """Fonts of the person's own system: nothing is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        text_size="md",
    )


def _settings(demo: Demo) -> tuple[Inputs, Callable[..., Any]]:
    limits, labels = demo.engine.limits, demo.engine.labels
    prompts = list(demo.prompts) or sample_captions(3, seed=5)
    with gr.Accordion("What to draw", open=True), gr.Row():
        with gr.Column(min_width=300, scale=2):
            text = gr.Textbox(prompts[0], label="Prompts, one per line", lines=4, max_lines=8, elem_id="prompts")
            gr.Examples([[prompt] for prompt in prompts], [text], label="Examples", cache_examples=False)
            file = gr.UploadButton(
                "Prompts from a file (.txt, .jsonl, .json)",
                file_types=[".txt", ".jsonl", ".json"],
                size="sm",
                elem_id="prompt-file",
            )
        with gr.Column(min_width=260):
            models = gr.CheckboxGroup(
                labels, value=labels[: limits.models], label=f"Models (2 to {limits.models})", elem_id="models"
            )
            if demo.allow_add:
                with gr.Accordion("Add a model", open=False):
                    name = gr.Textbox(
                        label="Name",
                        placeholder="label=folder, hub id, or npo:folder",
                        info="A pipeline, a LoRA or a training run on this machine, or an id on the hub.",
                    )
                    add = gr.Button("Add")
                    add.click(told(_adder(demo)), [name, models], [models, name], **QUICK)
        with gr.Column(min_width=260):
            with gr.Row():
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=110)
                count = gr.Number(1, label="Seeds", precision=0, minimum=1, maximum=limits.seeds, min_width=110)
            steps = gr.Slider(1, limits.steps, min(12, limits.steps), step=1, label="Steps")
            guidance = gr.Slider(0, limits.guidance, 3.0, step=0.5, label="Guidance")
            side = gr.Number(
                0, label="Size in pixels (0: the model's own)", precision=0, minimum=0, maximum=limits.side, step=8
            )

    def read(path: str) -> str:
        return "\n".join(read_prompts(path, limit=limits.prompts))

    file.upload(told(read), file, text, **QUICK)

    def refresh(chosen: list[str]) -> Any:
        return gr.CheckboxGroup(choices=demo.engine.labels, value=chosen)

    return Inputs(text, models, seed, count, steps, guidance, side), refresh


def _adder(demo: Demo) -> Callable[..., Any]:
    def add(name: str, chosen: list[str]) -> tuple[Any, str]:
        if len(demo.engine.labels) >= MAX_ADDED_MODELS:
            raise ConfigError(f"There are {MAX_ADDED_MODELS} models already; restart the demo with those you need.")
        spec = parse_model(name, demo.base)
        demo.engine.add(spec)
        chosen = [*chosen, spec.label][: demo.engine.limits.models]
        return gr.CheckboxGroup(choices=demo.engine.labels, value=chosen), ""

    return add
