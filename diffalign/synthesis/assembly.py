"""From judged candidates to rows of the table: ranking, setting aside, and the sums that reports are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ..data.schema import PreferenceRow, row_id_of
from .candidates import Candidate, Row, distance
from .config import RankingConfig
from .ranking import Ranking, Voter, is_complete, rank_by_given, rank_by_sum, rank_candidates, verdicts
from .store import stored_comparisons


@dataclass
class Assembled:
    """The rows of one shard.

    Args:
        rows: ranked, with the comparisons of judges.
        aside: cells of what is not ranked.
        facts: sums for the report; those of shards add up.
    """

    rows: list[tuple[PreferenceRow, dict[str, list[float]]]] = field(default_factory=list)
    aside: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def assemble(rows: Sequence[Row], config: RankingConfig, given: Mapping[str, float]) -> Assembled:
    """Rank each row or set it aside, and count.

    Args:
        rows: prompts with judged candidates.
        config: how to rank.
        given: weight of each pipeline, for ``rank_by="pipelines"``.
    """
    result, tally = Assembled(), _Tally()
    for row in rows:
        tally.note_drawn(row)
        ranking = rank_row(row, config, given)
        reason = ranking if isinstance(ranking, str) else ""
        bad = [number for number in range(len(row.candidates)) if number not in row.usable]
        if isinstance(ranking, Ranking):
            made = _ranked(row, ranking)
            result.rows.append((made, row.comparisons))
            tally.note_ranked(row, ranking, config)
        if reason or bad:
            result.aside.append(_aside(row, range(len(row.candidates)) if reason else bad, reason))
            tally.reasons[reason or "some of its pictures"] += 1
    result.facts = tally.facts()
    return result


def rank_row(row: Row, config: RankingConfig, given: Mapping[str, float]) -> Ranking | str:
    """The ranking of the usable candidates, or the reason why there is none."""
    usable = row.usable
    if len(usable) < 2:
        return f"{len(usable)} usable pictures of {len(row.candidates)}"
    if config.rank_by == "pipelines":
        return rank_by_given([given[row.candidates[number].pipeline] for number in usable])
    voters = {
        name: Voter(spec.weight, spec.family, spec.tie)
        for name, spec in config.scorers.items()
        if spec.votes and spec.weight  # without a weight nobody waits for its scores either
    }
    scores = {name: [row.scores[name][number] for number in usable] for name in voters}
    if config.rank_by == "weighted_sum":
        ranking = rank_by_sum(scores, voters, missing=config.missing)
    else:
        compared = {name: values for name, values in row.comparisons.items() if name in voters and values}
        ranking = rank_candidates(scores, missing=config.missing, comparisons=compared, voters=voters)
    missing = [name for name, values in scores.items() if not is_complete(values)]
    return ranking or f"missing scores of {', '.join(missing)} (rule {config.missing})"


def _ranked(row: Row, ranking: Ranking) -> PreferenceRow:
    chosen = [row.candidates[number] for number in row.usable]
    return PreferenceRow(
        prompt=row.prompt,
        image_bytes=[candidate.data for candidate in chosen],
        preference=ranking.preference,
        rank=ranking.rank,
        scores={name: [values[number] for number in row.usable] for name, values in row.scores.items()},
        sources=[candidate.source for candidate in chosen],
    )


def _aside(row: Row, numbers: Sequence[int], reason: str) -> dict[str, Any]:
    """Cells of the table of rows set aside: everything that a later ranking would need."""
    chosen: list[Candidate] = [row.candidates[number] for number in numbers]
    images = [candidate.data for candidate in chosen]
    return {
        "prompt": row.prompt,
        "images": [{"bytes": data, "path": None} for data in images],
        "sources": [candidate.source for candidate in chosen],
        "scores": [
            {"name": name, "values": [None if math.isnan(values[n]) else values[n] for n in numbers]}
            for name, values in row.scores.items()
        ],
        "comparisons": stored_comparisons(row.comparisons if reason else {}),
        "problems": [candidate.problem for candidate in chosen],
        "reason": reason,
        "row_id": row_id_of(row.prompt, images),
    }


class _Tally:
    """Sums over the rows of a shard."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.pipelines: dict[str, Counter[str]] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.agreement: dict[str, Counter[str]] = {}

    def note_drawn(self, row: Row) -> None:
        self.counts["prompts"] += 1
        usable = row.usable
        for number, candidate in enumerate(row.candidates):
            own = self.pipelines.setdefault(candidate.pipeline, Counter())
            own["images"] += 1
            if candidate.problem:
                self.problems[f"{candidate.pipeline}: {candidate.problem.split(':')[0].split(' of ')[0]}"] += 1
                own["problems"] += 1
            for name, values in row.scores.items() if number in usable else ():
                self._note_score(name, candidate.pipeline, values[number])
        for place, (i, j) in enumerate(combinations(usable, 2)):
            a, b = row.candidates[i], row.candidates[j]
            apart = row.distances[place] if row.distances else distance(a.thumbnail, b.thumbnail) / 255
            if not math.isnan(apart):
                self._add("diversity", apart)
                if a.pipeline == b.pipeline:
                    self.pipelines[a.pipeline]["diversity_pairs"] += 1
                    self.pipelines[a.pipeline]["diversity"] += apart  # type: ignore[assignment]

    def _add(self, name: str, value: float) -> None:
        self.counts[f"{name}_pairs"] += 1
        self.counts[name] += value  # type: ignore[assignment]

    def _note_score(self, name: str, pipeline: str, value: float) -> None:
        own = self.scores.setdefault(
            name, {"count": 0, "missing": 0, "sum": 0.0, "squares": 0.0, "lowest": math.inf, "highest": -math.inf}
        )
        if math.isnan(value):
            own["missing"] += 1
            return
        own["count"] += 1
        own["sum"] += value
        own["squares"] += value * value
        own["lowest"], own["highest"] = min(own["lowest"], value), max(own["highest"], value)
        self.pipelines[pipeline][f"score {name}"] += value  # type: ignore[assignment]
        self.pipelines[pipeline][f"scored {name}"] += 1

    def note_ranked(self, row: Row, ranking: Ranking, config: RankingConfig) -> None:
        self.counts["rows"] += 1
        self.counts["images"] += len(ranking.rank)
        self.counts["ties"] += ranking.rank.count(1) > 1
        self.counts["all_tied"] += max(ranking.rank) == 1
        for place, number in enumerate(row.usable):
            own = self.pipelines[row.candidates[number].pipeline]
            own["ranked"] += 1
            own["first"] += ranking.rank[place] == 1
            own["preference"] += ranking.preference[place]  # type: ignore[assignment]
        self._note_agreement(row, ranking, config)

    def _note_agreement(self, row: Row, ranking: Ranking, config: RankingConfig) -> None:
        """How often two models order a pair alike, and how often one contradicts the final order."""
        known: dict[str, list[int]] = {"(ranking)": verdicts([-rank for rank in ranking.rank])}
        for name, spec in config.scorers.items():
            values = [row.scores[name][number] for number in row.usable]
            compared = row.comparisons.get(name)
            if is_complete(compared or values):
                known[name] = verdicts(values, compared, spec.tie)
        for first, second in combinations(known, 2):
            own = self.agreement.setdefault(f"{first} | {second}", Counter())
            for a, b in zip(known[first], known[second], strict=True):
                own["decided"] += bool(a and b)
                own["alike"] += bool(a and a == b)

    def facts(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "reasons": dict(self.reasons),
            "problems": dict(self.problems),
            "pipelines": {name: dict(values) for name, values in self.pipelines.items()},
            "scores": self.scores,
            "agreement": {name: dict(values) for name, values in self.agreement.items()},
        }
