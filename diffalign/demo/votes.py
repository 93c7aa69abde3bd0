"""Blind votes: a shuffled pair, and a row of the preference table for each vote.

Every vote is a Parquet file of its own with one row in our schema, renamed into place when it is safe on the disk. A
crash loses nothing that was cast, several servers may share the folder, and the folder is a preference table as it is:
``diffalign train shapes-dpo dataset=votes``.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data import load_preferences, select_pairs
from ..data.pickapic import write_pickapic
from ..data.schema import PreferenceRow, write_preferences, write_shard
from ..errors import ConfigError, DataError
from ..evaluation.ratings import Game
from ..evaluation.roles import VOTE_SCORE
from ..randomness import keyed_permutation, keyed_seed
from ..synthesis.sampling import picture_seed
from .engine import Ask, Engine, Picture, Progress
from .models import ModelSpec
from .session import Session

log = logging.getLogger(__name__)

#: What a person can say of the left and the right picture, as shares of the vote. They are kept as the score
#: ``VOTE_SCORE``, which tells "both bad" from "tie"; the preference is 0.5 each for both.
CHOICES = {"left": (1.0, 0.0), "right": (0.0, 1.0), "tie": (0.5, 0.5), "both bad": (0.0, 0.0)}
_TRIES = 3  # seeds tried when two models draw the very same picture


@dataclass(frozen=True)
class Ballot:
    """A pair that waits for a vote; which model drew which side stays here.

    Args:
        id: random; decides the prompt, the seed, the models and their sides.
        ask: the settings, with the one prompt and seed.
        specs: models of the left and the right picture.
        pictures: the left and the right picture.
    """

    id: str
    ask: Ask
    specs: tuple[ModelSpec, ModelSpec]
    pictures: tuple[Picture, Picture]


def draw_ballot(engine: Engine, ask: Ask, session: Session, progress: Progress = lambda share, text: None) -> Ballot:
    """Two of the models at random, on one of the prompts at random, at random sides.

    Args:
        engine: draws.
        ask: prompts and at least two models to choose from, and settings; its seeds are not used.
        session: whose page asks; the ballot can be cast by it alone.
        progress: see :meth:`Engine.compare`.

    Raises:
        ConfigError: the request is refused, the models draw the same pictures, or one of them draws none.
        StoppedError: the session was stopped.
    """
    ask.check(engine.limits, engine.labels)
    if len(ask.models) < 2:
        raise ConfigError("A vote is between two models; choose two or more.")
    ballot_id = _ballot_id()
    prompt = ask.prompts[keyed_permutation(len(ask.prompts), ballot_id, "prompt")[0]]
    left, right = (ask.models[index] for index in keyed_permutation(len(ask.models), ballot_id, "models")[:2])
    for number in range(_TRIES):
        seed = keyed_seed(ballot_id, "seed", number) % 2**31
        one = Ask((prompt,), (seed,), (left, right), ask.steps, ask.guidance, ask.side)
        parts = engine.compare(one, session, lambda share, text: progress(share, "drawing a pair"), tally=False)
        pictures = [picture for part in parts for picture in part]
        if problem := pictures[0].problem or pictures[1].problem:
            raise ConfigError(f"One of the two pictures is none ({problem}), so there is nothing to choose between.")
        if pictures[0].path != pictures[1].path:
            ballot = Ballot(ballot_id, one, (engine.specs[left], engine.specs[right]), (pictures[0], pictures[1]))
            session.keep(ballot)
            return ballot
    raise ConfigError(f"{left} and {right} draw the very same pictures, so there is nothing to choose between them.")


def _ballot_id() -> str:
    """In order of time, and nobody's guess: whoever knew it could work out which model drew which side."""
    return f"{time.time_ns():016x}-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Cast:
    """A vote as read back: the two models (identity and revision), the outcome and who cast it."""

    models: tuple[str, str]
    outcome: float
    both_bad: bool
    prompt: str
    voter: str


class VoteBook:
    """All votes of a folder.

    Args:
        folder: the preference table; made with the first vote.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self._read: dict[str, Cast | None] = {}
        self._lock = threading.Lock()

    def cast(self, session: Session, ballot_id: str, choice: str, voter: str = "") -> Ballot:
        """Write a vote; when this returns it is on the disk.

        Args:
            session: the page that was shown the pair.
            ballot_id: of the pair.
            choice: one of ``CHOICES``.
            voter: letters and digits that tell one person's votes from another's; part of the file name.

        Returns:
            The ballot, which now may be shown with names.

        Raises:
            ConfigError: no such choice, or no such pair waits for this page's vote (a pair has one vote).
            DataError: the disk refused; the pair still waits.
        """
        if choice not in CHOICES:
            raise ConfigError(f"Expected one of {', '.join(CHOICES)}, got {choice!r}.")
        if not (voter.isalnum() and voter.isascii() and len(voter) <= 32):
            voter = "anyone"
        with self._lock:
            ballot = session.ballots.pop(ballot_id, None)
        if ballot is None:
            raise ConfigError(
                "This pair is not waiting for your vote: it has one already, or is too old. Draw another."
            )
        try:
            row = _row(ballot, choice)
        except OSError as error:
            raise DataError("The pictures of this pair are no longer kept; draw another pair.") from error
        try:
            write_shard([row], self.folder / f"train-{ballot.id}-{voter}.parquet")
        except DataError:
            session.keep(ballot)
            raise
        return ballot

    def votes(self) -> list[Cast]:
        """Every vote in the folder, oldest first; only new files are read."""
        with self._lock:
            files = sorted(self.folder.glob("train-*.parquet"))
            for file in files:
                if file.name not in self._read:
                    self._read[file.name] = _read(file)
            return [cast for file in files if (cast := self._read[file.name]) is not None]

    def games(self, voter: str | None = None, models: Sequence[ModelSpec] = ()) -> list[Game]:
        """Votes for :func:`~diffalign.evaluation.ratings.rate_models`; both bad is a tie.

        Args:
            voter: count this person's alone.
            models: those among the loaded models are called by their labels, unless another model that was voted on
                has that very name.
        """
        casts = [cast for cast in self.votes() if voter is None or cast.voter == voter]
        voted = {name for cast in casts for name in cast.models}
        labels = {_name(spec.identity, spec.revision): spec.label for spec in models}
        labels = {name: label for name, label in labels.items() if label == name or label not in voted}
        return [
            Game(labels.get(first, first), labels.get(second, second), cast.outcome, cast.prompt)
            for cast in casts
            for first, second in [cast.models]
        ]

    def export(self, folder: str | Path, layout: str = "preferences") -> list[Path]:
        """All votes as few files, for people who want a table.

        Args:
            folder: a new one.
            layout: ``preferences`` (our schema) or ``pickapic`` (Pick-a-Pic v2's columns; ties are labels of 0.5).

        Raises:
            ConfigError: no such layout.
            DataError: there is no vote, or the folder is taken.
        """
        if layout not in ("preferences", "pickapic"):
            raise ConfigError(f"Expected preferences or pickapic, got {layout!r}.")
        if not any(self.folder.glob("train-*.parquet")):
            raise DataError("There are no votes yet.")
        votes = load_preferences(self.folder)
        if layout == "preferences":
            return write_preferences(votes, folder)
        examples, _ = select_pairs(votes, ties="soft")
        return write_pickapic(votes, examples, folder)


def _row(ballot: Ballot, choice: str) -> PreferenceRow:
    shares = CHOICES[choice]
    preference = [0.5, 0.5] if shares[0] == shares[1] else list(shares)
    names = dict.fromkeys([*ballot.pictures[0].scores, *ballot.pictures[1].scores])
    scores = {name: [picture.scores.get(name, float("nan")) for picture in ballot.pictures] for name in names}
    return PreferenceRow(
        prompt=ballot.ask.prompts[0],
        image_bytes=[picture.path.read_bytes() for picture in ballot.pictures],
        preference=preference,
        rank=[1, 1] if preference[0] == 0.5 else [1 + int(share == 0) for share in shares],
        scores={VOTE_SCORE: list(shares), **scores},
        sources=[
            _source(spec, picture, ballot.ask) for spec, picture in zip(ballot.specs, ballot.pictures, strict=True)
        ],
    )


def _source(spec: ModelSpec, picture: Picture, ask: Ask) -> dict[str, Any]:
    return {
        "model": spec.identity,
        "revision": spec.revision,
        "seed": picture_seed(picture.prompt, picture.seed),
        "steps": ask.steps,
        "guidance": ask.guidance,
        "scheduler": picture.scheduler,
    }


def _read(file: Path) -> Cast | None:
    """A vote without its pictures; None (and a line in the log) for a file that is none."""
    try:
        row = pq.read_table(file, columns=["prompt", "sources", "preference", "scores"]).to_pylist()[0]
        first, second = (_name(source["model"], source["revision"]) for source in row["sources"])
        shares = next(score["values"] for score in row["scores"] if score["name"] == VOTE_SCORE)
        voter = file.stem.rsplit("-", 1)[-1]
        if first == second:
            raise ValueError("both pictures are one model's")
        return Cast((first, second), row["preference"][0], shares == [0.0, 0.0], row["prompt"], voter)
    except (OSError, pa.ArrowException, KeyError, IndexError, ValueError, StopIteration, TypeError) as error:
        log.warning("%s is no vote of this demo and is left out of the ratings (%s)", file, error)
        return None


def _name(model: str, revision: str | None) -> str:
    return f"{model} ({revision})" if revision else model
