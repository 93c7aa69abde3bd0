"""Strength of models from votes on pairs: Bradley-Terry on the Elo scale, and win rates that hold for few votes.

Bradley and Terry (1952): P(a beats b) = 1 / (1 + exp(s_b - s_a)). A tie counts as half a win for each side. Unlike
Elo's own running update, the fit does not depend on the order of the votes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse.csgraph import connected_components

from ..errors import DataError
from .statistics import Interval, cluster_ids, wilson

ELO_POINTS = 400 / math.log(10)  # per unit of log odds: 400 points are odds of 10 to 1
ELO_MEAN = 1000.0
_PRIOR_TIES = 1.0  # ties of each model with a model of mean strength: all won is a high rating, not an infinite one
_NEWTON_STEPS = 50

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Game:
    """One vote on a pair.

    Args:
        first, second: names of the two models.
        outcome: 1 when the first was better, 0 when the second was, 0.5 for a tie.
        cluster: what makes votes depend on each other, usually the prompt.
    """

    first: str
    second: str
    outcome: float
    cluster: Hashable = None


@dataclass(frozen=True)
class Rating:
    """A model's place among the others.

    Args:
        name: the model.
        elo: strength with its interval; the mean of all rated models is 1000. NaN where votes do not connect it with
            the others.
        wins, ties, losses: numbers of votes.
    """

    name: str
    elo: Interval
    wins: int
    ties: int
    losses: int

    @property
    def games(self) -> int:
        """Votes the model took part in."""
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class Duel:
    """Votes between two models; ``rate`` is the first's share of wins, a tie counting half."""

    first: str
    second: str
    rate: Interval
    wins: int
    ties: int
    losses: int


def rate_models(games: Sequence[Game], *, confidence: float = 0.95) -> list[Rating]:
    """Bradley-Terry ratings, the strongest first.

    The interval is the wider of two: from the fit's own variance (inverse Hessian, which stays honest when few votes
    all agree) and from the one that is robust to clusters (votes on one prompt are not independent).

    Args:
        games: votes.
        confidence: probability with which an interval is meant to hold the true strength.

    Raises:
        DataError: an outcome outside [0, 1], or a model against itself.
    """
    _check(games)
    names = sorted({name for game in games for name in (game.first, game.second)})
    if not names:
        return []
    number = {name: index for index, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for game in games:
        wins[number[game.first], number[game.second]] += game.outcome
        wins[number[game.second], number[game.first]] += 1 - game.outcome
    count, group = connected_components(wins + wins.T, directed=False)
    largest = np.flatnonzero(group == np.bincount(group, wins.sum(1), count).argmax())  # by votes
    strength, reach = np.full(len(names), math.nan), np.full(len(names), math.nan)
    rated = [names[index] for index in largest]
    within = [game for game in games if game.first in rated]
    strength[largest], reach[largest] = _fit(wins[np.ix_(largest, largest)], within, rated, confidence)
    ratings = [
        Rating(name, _elo(strength[index], reach[index]), *_record(games, name)) for index, name in enumerate(names)
    ]
    return sorted(ratings, key=lambda rating: -rating.elo.mean if rating.elo.mean == rating.elo.mean else math.inf)


def duels(games: Sequence[Game], *, confidence: float = 0.95) -> list[Duel]:
    """Win rate of every pair of models that met, names in alphabetical order within a pair."""
    _check(games)
    met: dict[tuple[str, str], list[Game]] = {}
    for game in games:
        turned = game if game.first < game.second else Game(game.second, game.first, 1 - game.outcome, game.cluster)
        met.setdefault((turned.first, turned.second), []).append(turned)
    return [
        Duel(
            *pair,
            win_rate([g.outcome for g in own], [g.cluster for g in own], confidence=confidence),
            wins=sum(g.outcome > 0.5 for g in own),
            ties=sum(g.outcome == 0.5 for g in own),
            losses=sum(g.outcome < 0.5 for g in own),
        )
        for pair, own in sorted(met.items())
    ]


def win_rate(outcomes: Sequence[float], clusters: Sequence[Hashable], *, confidence: float = 0.95) -> Interval:
    """Share of wins with Wilson's interval, as wide as if each cluster were one vote.

    Args:
        outcomes: 1, 0.5 or 0 each.
        clusters: as many keys; equal ones depend on each other.
        confidence: of the interval.
    """
    if not len(outcomes):
        return Interval(math.nan, math.nan, math.nan)
    return wilson(float(np.mean(outcomes)), len(set(clusters)), confidence)


def _fit(wins: Matrix, games: Sequence[Game], names: list[str], confidence: float) -> tuple[Matrix, Matrix]:
    """(k,) strengths of mean 0 in log odds, and how far their intervals reach to either side."""
    k = len(wins)
    played = wins + wins.T
    strength = np.zeros(k)
    for _ in range(_NEWTON_STEPS):
        chance = _chance(strength)
        prior = 1 / (1 + np.exp(-strength))
        gradient = (wins - played * chance).sum(1) + _PRIOR_TIES * (0.5 - prior)
        hessian = _information(played * chance * (1 - chance), _PRIOR_TIES * prior * (1 - prior))
        step = np.linalg.solve(hessian, gradient)
        strength += np.clip(step, -1.0, 1.0)  # far from the optimum a whole Newton step can overshoot
        if np.abs(step).max() < 1e-10:
            break
    centre = np.eye(k) - 1 / k
    inverse = np.linalg.inv(hessian)
    upper = (1 + confidence) / 2
    reach = stats.norm.ppf(upper) * _roots(centre @ inverse @ centre)
    scores = _cluster_scores(strength, games, names)
    if (m := len(scores)) > 1:
        sandwich = inverse @ (scores.T @ scores * (m / (m - 1))) @ inverse
        reach = np.maximum(reach, stats.t.ppf(upper, m - 1) * _roots(centre @ sandwich @ centre))
    return centre @ strength, reach


def _roots(covariance: Matrix) -> Matrix:
    """Standard errors; rounding may leave a variance of zero just below it."""
    return np.sqrt(np.maximum(np.diag(covariance), 0.0))


def _information(weights: Matrix, prior: Matrix) -> Matrix:
    """Negative second derivative of the log posterior."""
    return np.diag(weights.sum(1) + prior) - weights


def _cluster_scores(strength: Matrix, games: Sequence[Game], names: list[str]) -> Matrix:
    """(m, k) gradient of the log likelihood that each cluster contributes."""
    number = {name: index for index, name in enumerate(names)}
    ids = cluster_ids([game.cluster for game in games])
    scores = np.zeros((int(ids.max()) + 1, len(names)))
    for game, cluster in zip(games, ids, strict=True):
        a, b = number[game.first], number[game.second]
        surprise = game.outcome - 1 / (1 + math.exp(strength[b] - strength[a]))
        scores[cluster, a] += surprise
        scores[cluster, b] -= surprise
    return scores


def _chance(strength: Matrix) -> Matrix:
    """(k, k) probability that the row's model beats the column's."""
    return 1 / (1 + np.exp(strength[None, :] - strength[:, None]))


def _elo(strength: float, reach: float) -> Interval:
    middle = ELO_MEAN + ELO_POINTS * strength
    return Interval(float(middle), float(middle - ELO_POINTS * reach), float(middle + ELO_POINTS * reach))


def _record(games: Sequence[Game], name: str) -> tuple[int, int, int]:
    own = [g.outcome if g.first == name else 1 - g.outcome for g in games if name in (g.first, g.second)]
    return sum(o > 0.5 for o in own), sum(o == 0.5 for o in own), sum(o < 0.5 for o in own)


def _check(games: Sequence[Game]) -> None:
    for game in games:
        if not 0.0 <= game.outcome <= 1.0 or game.first == game.second:
            raise DataError(f"a vote is between two models with an outcome from 0 to 1, got {game}.")
