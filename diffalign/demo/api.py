"""The endpoints for programs (docs/demo.md); the page's own events are private."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr

from ..errors import ConfigError
from ..evaluation.ratings import duels, rate_models
from ..evaluation.statistics import Interval
from .engine import Ask, Picture
from .sheet import url_of
from .ui import Demo, told
from .ui_vote import export_votes
from .votes import draw_ballot


def register(demo: Demo) -> None:
    """Add the endpoints to the page under construction."""
    engine = demo.engine

    @told
    def models() -> list[dict]:
        """What can be compared: label, kind, source, base and revision of each model."""
        return [dict(vars(spec)) for spec in engine.specs.values()]

    @told
    def compare(
        prompts: list[str],
        models: list[str],
        seeds: list[int],
        request: gr.Request,
        steps: int = demo.steps,
        guidance: float = demo.guidance,
        size: int | None = None,
    ) -> list[dict]:
        """Draw every prompt with every seed by every model: model, prompt, seed, url and scores of each picture."""
        ask = Ask(_list(prompts), _list(seeds), _list(models), steps, guidance, size)
        parts = engine.compare(ask, engine.sessions[request.session_hash])
        return [_picture(picture) for part in parts for picture in part]

    @told
    def pair(
        prompts: list[str],
        models: list[str],
        request: gr.Request,
        steps: int = demo.steps,
        guidance: float = demo.guidance,
        size: int | None = None,
    ) -> dict:
        """A blind pair: its id, prompt, and the urls of the left and the right picture."""
        ask = Ask(_list(prompts), (0,), _list(models), steps, guidance, size)
        ballot = draw_ballot(engine, ask, engine.sessions[request.session_hash])
        left, right = (url_of(picture.path) for picture in ballot.pictures)
        return {"id": ballot.id, "prompt": ballot.ask.prompts[0], "left": left, "right": right}

    @told
    def vote(id: str, choice: str, request: gr.Request, voter: str = "") -> dict:
        """Vote on a pair of this client: left, right, tie or both bad. Returns which model was on which side."""
        ballot = demo.votes.cast(engine.sessions[request.session_hash], id, choice, voter)
        left, right = (spec.label for spec in ballot.specs)
        return {"left": left, "right": right, "choice": choice}

    @told
    def standings() -> dict:
        """Ratings and head-to-head win rates over all votes."""
        games = demo.votes.games(models=list(engine.specs.values()))
        return {
            "votes": len(games),
            "ratings": [{**vars(rating), "elo": _interval(rating.elo)} for rating in rate_models(games)],
            "pairs": [{**vars(duel), "rate": _interval(duel.rate)} for duel in duels(games)],
        }

    @told
    def export(layout: str = "preferences") -> list[str]:
        """All votes as Parquet (preferences or pickapic): urls of the files."""
        return [url_of(file) for file in export_votes(demo, layout)]

    for fn in (models, vote, standings, export):
        gr.api(fn, concurrency_limit=8)
    for fn in (compare, pair):
        gr.api(fn, concurrency_id="drawing", concurrency_limit=1)


def _list(items: Any) -> tuple[Any, ...]:
    if not isinstance(items, list):  # a text would be taken for a list of its letters
        raise ConfigError(f"Expected a list of prompts, of models and of seeds, got {items!r:.60}.")
    return tuple(items)


def _picture(picture: Picture) -> dict[str, Any]:
    return {
        "model": picture.model,
        "prompt": picture.prompt,
        "seed": picture.seed,
        "url": url_of(picture.path),
        "scores": {name: _number(value) for name, value in picture.scores.items()},
    }


def _interval(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in vars(interval).items()}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
