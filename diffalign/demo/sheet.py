"""Pictures, scores and tables as HTML that fits a phone and a desk, with words for people who do not see it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ..evaluation.ratings import Duel, Rating
from ..evaluation.statistics import Interval
from .engine import Ask, Picture
from .tally import Standing, best
from .votes import Ballot

VIEWS = ("Side by side", "Seed strip")
_SMALL = 256  # pixels; smaller pictures are enlarged with sharp edges


def url_of(path: Path) -> str:
    """Where the page finds one of the server's own files."""
    return f"gradio_api/file={quote(str(path))}"


def render_sheet(pictures: Sequence[Picture], ask: Ask, view: str = VIEWS[0]) -> str:
    """All pictures of a request.

    Args:
        pictures: as far as they are drawn.
        ask: what was asked for.
        view: ``Side by side`` shows the models of each cell beside each other; ``Seed strip`` one row a model.
    """
    at = {(picture.prompt, picture.seed, picture.model): picture for picture in pictures}
    blocks = []
    for prompt in ask.prompts:
        rows = []
        if view == VIEWS[1]:
            rows = [_strip(model, [at.get((prompt, seed, model)) for seed in ask.seeds], at) for model in ask.models]
        else:
            rows = [_cards(seed, [at.get((prompt, seed, model)) for model in ask.models]) for seed in ask.seeds]
        if any(rows):
            blocks.append(f"<section class='cell'><h3 dir='auto'>{html.escape(prompt)}</h3>{''.join(rows)}</section>")
    return f"<div class='sheet'>{''.join(blocks)}</div>" if blocks else ""


def render_ballot(ballot: Ballot, choice: str | None = None) -> str:
    """The pair of a vote; names and scores appear with the choice, not before."""
    figures = []
    for side, picture in zip(("Left", "Right"), ballot.pictures, strict=True):
        chosen = choice == side.lower()
        told = "" if choice is None else _names(picture, ballot, chosen)
        figures.append(
            f"<figure class='{'best' if chosen else ''}'>{_image(picture, f'{side} picture')}"
            f"<figcaption><b>{side}</b>{told}</figcaption></figure>"
        )
    prompt = html.escape(ballot.ask.prompts[0])
    return (
        f"<div class='sheet'><section class='cell'><h3 dir='auto'>{prompt}</h3>"
        f"<div class='cards' style='--n:2'>{''.join(figures)}</div></section></div>"
    )


def render_standings(standings: Sequence[Standing], score: str) -> str:
    """The running win-rate table of one score."""
    rows = [
        (s.model, _interval(s.rate), str(s.wins), str(s.ties), str(s.losses), _number(s.difference, "+"))
        for s in standings
    ]
    head = ("model", "win rate [95 %]", "wins", "ties", "losses", "mean difference")
    against = standings[0].against if standings else ""
    return table(head, rows, f"Score {score}: each model against {against}, on the prompts and seeds of this page")


def render_ratings(ratings: Sequence[Rating], pairs: Sequence[Duel], votes: int) -> str:
    """Ratings and head-to-head results of the votes."""
    if not ratings:
        return "<p class='hint'>No votes yet. The first one appears here.</p>"
    first = table(
        ("model", "Elo [95 %]", "wins", "ties", "losses"),
        [(r.name, _interval(r.elo, ".0f"), str(r.wins), str(r.ties), str(r.losses)) for r in ratings],
        f"Bradley-Terry ratings over {votes} {'vote' if votes == 1 else 'votes'}; the mean is 1000",
    )
    second = table(
        ("pair", "win rate [95 %]", "wins", "ties", "losses"),
        [(f"{d.first} – {d.second}", _interval(d.rate), str(d.wins), str(d.ties), str(d.losses)) for d in pairs],
        "Head to head: how often the first beat the second; a tie counts half",
    )
    return first + second


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """An HTML table that scrolls sideways where it does not fit."""
    cells = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    words = html.escape(caption)  # above the part that scrolls, so that it wraps on a phone
    return (
        f"<p class='caption'>{words}</p><div class='scroll' tabindex='0' role='region' aria-label='{words}'>"
        f"<table class='numbers'><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def hint(text: str) -> str:
    """The line that says what a panel shows."""
    return f"<p class='hint'>{text}</p>"


def _cards(seed: int, pictures: Sequence[Picture | None]) -> str:
    present = [picture for picture in pictures if picture is not None]
    if not present:
        return ""
    marked = _best(present)
    figures = "".join(
        f"<figure class='{'best' if any(index in winners for winners in marked.values()) else ''}'>"
        f"{_image(picture, f'{picture.model}, seed {seed}: {picture.prompt}')}"
        f"<figcaption><b>{html.escape(picture.model)}</b>{_scores(picture, index, marked)}</figcaption></figure>"
        for index, picture in enumerate(present)
    )
    return f"<h4>seed {seed}</h4><div class='cards' style='--n:{len(pictures)}'>{figures}</div>"


def _strip(model: str, pictures: Sequence[Picture | None], at: dict[tuple[str, int, str], Picture]) -> str:
    figures = []
    for picture in (picture for picture in pictures if picture is not None):
        rivals = [p for p in at.values() if (p.prompt, p.seed) == (picture.prompt, picture.seed)]
        marked, index = _best(rivals), rivals.index(picture)
        won = any(index in winners for winners in marked.values())
        image = _image(picture, f"{model}, seed {picture.seed}: {picture.prompt}")
        figures.append(
            f"<figure class='{'best' if won else ''}'>{image}"
            f"<figcaption>seed {picture.seed}{_scores(picture, index, marked)}</figcaption></figure>"
        )
    return f"<h4>{html.escape(model)}</h4><div class='strip'>{''.join(figures)}</div>" if figures else ""


def _best(pictures: Sequence[Picture]) -> dict[str, set[int]]:
    """Indices of the best pictures by score."""
    names = dict.fromkeys(name for picture in pictures for name in picture.scores)
    return {name: best([picture.scores.get(name, math.nan) for picture in pictures]) for name in names}


def _scores(picture: Picture, index: int, marked: dict[str, set[int]]) -> str:
    items = "".join(
        f"<li class='{'top' if index in marked[name] else ''}'>{html.escape(name)} <span>{_number(value)}"
        f"{' ★<i>best</i>' if index in marked[name] else ''}</span></li>"
        for name, value in picture.scores.items()
    )
    return f"<ul>{items}</ul>" if items else ""


def _names(picture: Picture, ballot: Ballot, chosen: bool) -> str:
    words = f": {html.escape(picture.model)}{' (your choice)' if chosen else ''}"
    return words + _scores(picture, ballot.pictures.index(picture), _best(ballot.pictures))


def _image(picture: Picture, words: str) -> str:
    if not picture.path.exists():
        return "<div class='gone'>This picture is no longer kept; draw it again.</div>"
    width, height = picture.size
    small = " class='small'" if max(width, height) < _SMALL else ""
    problem = f"<p class='problem'>No picture: {picture.problem}. Not scored.</p>" if picture.problem else ""
    alt = html.escape(words, quote=True)
    return f"<img src='{url_of(picture.path)}' alt='{alt}' width='{width}' height='{height}'{small}>{problem}"


def _number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.3g}"


def _interval(interval: Interval, form: str = ".2f") -> str:
    if math.isnan(interval.mean):
        return "–"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
