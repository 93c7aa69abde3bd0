"""Scores of many pictures by several reward models, one model in memory at a time, and how far the models agree."""

from __future__ import annotations

import gc
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from scipy import stats
from tqdm.auto import tqdm

from reward_models import RewardModelError, can_score, load_reward_model
from reward_models.ensemble import check_rules, combine

from .. import __version__
from ..data.files import atomic_file
from ..environment import code_commit
from ..errors import ConfigError
from .score_sources import ScoredPicture, open_pictures
from .scores import ScoreStore, Value, as_float
from .statistics import json_number

log = logging.getLogger(__name__)
IDENTITIES = b"reward_models"  # key of the Parquet file's metadata
_KEYS = ("row", "image", "file", "prompt")


@dataclass(frozen=True)
class ModelChoice:
    """A reward model to ask.

    Args:
        column: name of its scores.
        model: a name, a dotted path, or what :func:`reward_models.load_reward_model` takes.
        options: the model's own options.
    """

    column: str
    model: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, str]:
        """The options as they are written down; a server's key is not."""
        return {name: str(value) for name, value in self.options.items() if name != "api_key"}


@dataclass(frozen=True)
class EnsembleChoice:
    """One more column, ``ensemble``, from those of the models; see :func:`reward_models.ensemble.combine`."""

    rule: str
    weights: Mapping[str, float] = field(default_factory=dict)
    missing: str = "skip_model"


def score_table(
    source: str | Path,
    models: Sequence[ModelChoice],
    output: str | Path,
    *,
    prompt: str | None = None,
    split: str = "train",
    revision: str | None = None,
    ensemble: EnsembleChoice | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score all pictures of a source with each model in turn.

    Each model is loaded when it is its turn and let go before the next. Scores are kept in ``OUTPUT.parts`` while the
    command runs: a stopped one, run again, asks only for what is missing or was judged by another model, revision or
    code. The folder is removed when the output is written.

    Args:
        source: see :func:`~.score_sources.open_pictures`, as are ``prompt``, ``split`` and ``revision``.
        models: who judges, in this order.
        output: a .parquet or .csv file, one row a picture: row, image (its number in the row), file, prompt, and a
            column for each model, null where a score is missing. ``OUTPUT.json`` beside it holds the summary.
        ensemble: adds the column ``ensemble``; pictures of one prompt are a group, wherever they stand.
        device: where models with weights run.
        overwrite: replace an output that exists.
        progress: show a progress bar for each model.

    Returns:
        The summary: identity of each model, number of scores and of missing ones, mean, deviation and range, seconds,
        and Spearman's and Pearson's correlation of each two columns with the number of pictures both judged.

    Raises:
        ConfigError: the output's kind, a model or an ensemble's setting cannot be used, or the output exists.
        DataError: a picture or prompt cannot be read; names its row.
    """
    target = Path(output)
    _check(models, target, ensemble, overwrite)
    pictures = open_pictures(source, prompt=prompt, split=split, revision=revision)
    keys: list[str | None] = [picture.key() for picture in pictures]
    parts = target.with_name(target.name + ".parts")
    columns: dict[str, list[float]] = {}
    summary: dict[str, Any] = {"source": str(source), "pictures": len(pictures), "models": {}}
    for choice in models:
        began = time.perf_counter()
        identity, columns[choice.column] = _ask(choice, pictures, keys, parts, device, progress)
        record = {"model": str(choice.model), "options": choice.recorded}
        record |= {"identity": identity, **_describe(columns[choice.column])}
        summary["models"][choice.column] = record | {"seconds": round(time.perf_counter() - began, 3)}
        _free()
    if ensemble is not None:
        raw = {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
        prompts = [picture.prompt for picture in pictures]
        combined = combine(raw, prompts, rule=ensemble.rule, weights=ensemble.weights, missing=ensemble.missing)
        columns["ensemble"] = combined.tolist()
        summary["ensemble"] = asdict(ensemble) | _describe(columns["ensemble"])
    summary["correlations"] = correlations(columns)
    summary |= {"diffalign": __version__, "commit": code_commit()}
    _write(target, pictures, columns, summary)
    shutil.rmtree(parts, ignore_errors=True)
    return summary


def correlations(columns: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Spearman's and Pearson's correlation of each two columns.

    Args:
        columns: N scores by name, NaN where missing.

    Returns:
        One entry for each two names: ``between``, ``spearman``, ``pearson`` (None with fewer than three pictures that
        both judged, or where one gave all of them the same score) and ``n``.
    """
    found = []
    for first, second in combinations(columns, 2):
        a, b = np.asarray(columns[first], dtype=np.float64), np.asarray(columns[second], dtype=np.float64)
        both = ~(np.isnan(a) | np.isnan(b))
        a, b = a[both], b[both]
        usable = len(a) >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0
        found.append(
            {
                "between": [first, second],
                "spearman": float(stats.spearmanr(a, b).statistic) if usable else None,
                "pearson": float(stats.pearsonr(a, b).statistic) if usable else None,
                "n": len(a),
            }
        )
    return found


def _ask(
    choice: ModelChoice,
    pictures: Sequence[ScoredPicture],
    keys: Sequence[str | None],
    parts: Path,
    device: str | None,
    progress: bool,
) -> tuple[dict[str, Any], list[float]]:
    """The model's identity and its scores. The model is this function's alone, and gone when it returns."""
    try:
        model = load_reward_model(choice.model, device=device, **choice.options)
    except RewardModelError as error:
        raise ConfigError(f"{choice.column}: {error}") from error
    if not can_score(model):
        raise ConfigError(f"{choice.column} compares pairs and cannot score single pictures; leave it out.")
    log.info("%s: %d pictures", choice.column, len(pictures))
    with tqdm(total=len(pictures), desc=choice.column, unit="picture", disable=not progress) as bar:

        def ask(positions: list[int]) -> list[Value]:
            chosen = [pictures[i] for i in positions]
            images = [picture.image() for picture in chosen]
            scores = model.score(images, [picture.prompt for picture in chosen]).tolist()
            bar.update(len(chosen))
            return [None if math.isnan(score) else score for score in scores]

        identity = dict(model.identity)
        values = ScoreStore(parts, choice.column, identity | {"options": choice.recorded}).fill(keys, ask)
    return identity, [as_float(value) for value in values]


def _free() -> None:
    """Return the memory of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(models: Sequence[ModelChoice], target: Path, ensemble: EnsembleChoice | None, overwrite: bool) -> None:
    names = [choice.column for choice in models]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"expected one or more reward models with different names, got {', '.join(names) or 'none'}.")
    if any(choice.model == "ensemble" for choice in models):
        raise ConfigError("give the members as models and combine them with --ensemble RULE: one in memory at a time.")
    if taken := {*_KEYS, "ensemble"}.intersection(names):
        raise ConfigError(f"a model's scores cannot be named {taken.pop()!r}; give another as NAME=MODEL.")
    if target.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"{target}: expected an output ending in .parquet or .csv.")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; give another output, or --overwrite to replace it.")
    if ensemble is None:
        return
    try:
        check_rules(ensemble.rule, ensemble.missing)
        combine({name: torch.empty(0) for name in names}, [], rule=ensemble.rule, weights=ensemble.weights)
    except RewardModelError as error:
        raise ConfigError(str(error)) from error


def _describe(values: Sequence[float]) -> dict[str, Any]:
    present = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    names = ("mean", "std", "min", "max")
    known = {name: json_number(float(getattr(present, name)())) if len(present) else None for name in names}
    return {"scored": len(present), "missing": len(values) - len(present)} | known


def _write(
    target: Path, pictures: Sequence[ScoredPicture], columns: Mapping[str, list[float]], summary: Mapping[str, Any]
) -> None:
    identities = {name: record["identity"] for name, record in summary["models"].items()}
    table = pa.table(
        {
            "row": pa.array([picture.row for picture in pictures], pa.int64()),
            "image": pa.array([picture.number for picture in pictures], pa.int64()),
            "file": [picture.name for picture in pictures],
            "prompt": [picture.prompt for picture in pictures],
            # Exact: the scores are fp32, and null, not NaN, is what a reader takes for missing.
            **{name: pa.array(values, pa.float32(), from_pandas=True) for name, values in columns.items()},
        }
    ).replace_schema_metadata({IDENTITIES: json.dumps(identities).encode()})
    buffer = io.BytesIO()
    if target.suffix == ".parquet":
        pyarrow.parquet.write_table(table, buffer)
    else:
        pyarrow.csv.write_csv(table, buffer)
    for path, content in (
        (target.with_name(target.name + ".json"), json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n"),
        (target, buffer.getvalue()),  # last: where it is, the work is done
    ):
        with atomic_file(path) as file:
            file.write(content)
