"""What a judge's answer says, read strictly: an answer that is not of the asked form is missing, never a guess.

Every parser takes any string, never raises, and returns the numbers that the answer states and, where one is missing,
why. Pair parsers return shares of the picture shown first: 1 it is better, 0 the other is, 1/2 a tie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OVERALL = "overall"
DIMENSIONS = ("alignment", "coherence", "style")
SUM_TOLERANCE = 0.02  # of two shares that have to add up to 1, as models round to two digits

_DECORATION = r"[ \t*_`#>~-]*"  # within a line: a run that crosses lines would be read again from each of them
_NUMBER = re.compile(r"[\s*_`]*([-+]?[0-9]+(?:\.[0-9]+)?)[\s*_`.,;|/)\]]*")
_IMAGE = re.compile(r"image[\s*_`#]*([12])[\s*_`]*:", re.IGNORECASE)
_VERDICTS = {"image 1 is better": 1.0, "image 2 is better": 0.0}
_DENIAL = re.compile(r"\b(?:not?|nor|never|neither|cannot|t|doubt|hardly|wrong|false|whether|if|unless)\b")  # t: isn't
_WINNERS = {"Image 1": 1.0, "Image 2": 0.0}


@dataclass(frozen=True)
class Parsed:
    """What an answer states: numbers by dimension (``overall`` or the names in ``DIMENSIONS``)."""

    values: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    """Why a number is missing; empty when none is."""
    consistent: bool | None = None
    """Whether the reasons add up to the verdict, in the forms that show their sums; None where nothing is shown."""


def parse_verdict(text: str) -> Parsed:
    """``Image 1 is better``, ``Image 2 is better`` or ``Both images are equally good`` somewhere in free text.

    Exactly one of the three may be said; one that its own clause denies or questions before ("I doubt that ...") is
    not. Text before ``</think>`` is not read, and inside ``<answer>`` tags only what the last complete pair holds.
    """
    spoken = _spoken(text)
    if "<answer" in spoken.lower():
        inside = _answer(spoken)
        if inside is None:
            return Parsed(problem="the <answer> tag is not closed")
        spoken = inside
    found = [share for verdict, share in (_VERDICTS | {"equally good": 0.5}).items() if _is_said(verdict, spoken)]
    if len(found) != 1:
        return Parsed(problem="no verdict" if not found else "more than one verdict")
    return Parsed({OVERALL: found[0]})


def parse_think(text: str) -> Parsed:
    """UnifiedReward-Think: the last complete ``<answer>`` holds one of two verdicts and nothing else; no ties."""
    inside = _answer(_spoken(text))
    if inside is None:
        return Parsed(problem="no complete <answer>")
    share = _VERDICTS.get(_words(inside))
    if share is None:
        return Parsed(problem="the <answer> is not one of the two verdicts")
    totals = _totals(text)
    return Parsed({OVERALL: share}, consistent=None if totals is None else (totals[0] - totals[1]) * (share - 0.5) > 0)


def parse_shares(text: str) -> Parsed:
    """UnifiedReward-2.0 pairs: per dimension ``Image 1: x`` and ``Image 2: y`` in [0, 1] with x + y = 1."""
    values: dict[str, float] = {}
    for name, block in _labelled(_spoken(text), _DIMENSION_LABEL, whole_block=True):
        shares = {label: _number(region) for label, region in _labelled(block, _IMAGE_LABEL)}
        first, second = shares.get("1"), shares.get("2")
        values.pop(name, None)  # the last block of a name counts, even where it cannot be read
        if first is None or second is None or min(first, second) < 0 or abs(first + second - 1) > SUM_TOLERANCE:
            continue
        values[name] = first / (first + second)
    return _all_dimensions(values)


def parse_dimensions(text: str) -> Parsed:
    """UnifiedReward-2.0 points: ``Alignment Score (1-5): x`` and likewise Coherence and Style, each in [1, 5]."""
    return _all_dimensions(_last_numbers(_spoken(text), _DIMENSION_LABEL))


def parse_final_score(text: str) -> Parsed:
    """UnifiedReward 1.0 points: the number in [1, 5] after the last ``Final Score:``."""
    values = _last_numbers(_spoken(text), _FINAL_LABEL)
    if "final" not in values:
        return Parsed(problem="no Final Score between 1 and 5")
    return Parsed({OVERALL: values["final"]})


def parse_flex(text: str) -> Parsed:
    """UnifiedReward-Flex: one JSON object (a code fence around it is allowed) whose schema holds throughout."""
    try:
        answer = _strict_json(_spoken(text))
        _text(answer, "reason")
        share = _share(answer, "winner")
        winners = [_category(category) for category in _list(answer, "categories", 3, 4)]
    except (ValueError, RecursionError) as error:
        return Parsed(problem=f"not the JSON asked for: {str(error)[:120]}")
    return Parsed({OVERALL: share}, consistent=(sum(winners) / len(winners) - 0.5) * (share - 0.5) >= 0)


def parse_edit_scores(text: str) -> Parsed:
    """UnifiedReward-Edit pairs: ``Image 1: x`` and ``Image 2: y``, any two numbers, negative ones too."""
    numbers = {label: _number(region) for label, region in _labelled(_spoken(text), _IMAGE_LABEL)}
    values = {f"image {key}": value for key, value in numbers.items() if value is not None}
    return Parsed(values, problem="" if len(values) == 2 else "not a number for each image")


def parse_edit_point(text: str) -> Parsed:
    """UnifiedReward-Edit points: JSON with ``score: [a, b]``, following and quality, each in [0, 25]."""
    try:
        scores = _list(_strict_json(_spoken(text)), "score", 2, 2)
        following, quality = (_real(score, 0, 25) for score in scores)
    except (ValueError, RecursionError) as error:
        return Parsed(problem=f"not the JSON asked for: {str(error)[:120]}")
    return Parsed({"following": following, "quality": quality})


def _spoken(text: str) -> str:
    """What comes after the thinking. Thinking that never ends leaves nothing."""
    lower = text.lower()
    closed = lower.rfind("</think>")
    if closed >= 0:
        return text[closed + len("</think>") :]
    return "" if "<think>" in lower else text


def _answer(text: str) -> str | None:
    """The inside of the last complete ``<answer>...</answer>``."""
    lower = text.lower()
    end = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if end >= 0 and start >= 0 else None


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]|_", " ", text.casefold()).split())


def _is_said(phrase: str, text: str) -> bool:
    """Whether some clause holds the phrase with no denial before it; a phrase may run over a line's end."""
    clauses = re.sub(r"[^\w\s|]|_", " ", re.sub(r"[.,:;!?\n]+", " | ", text.casefold()))
    words = " ".join(clauses.split())
    places = re.finditer(r"\b" + r" (?:\| )?".join(phrase.split()) + r"\b", words)
    return any(not _DENIAL.search(words[: place.start()].rpartition("|")[2]) for place in places)


def _number(region: str) -> float | None:
    """The number that a region consists of; nothing else may stand there but decoration, so 3/5 and 1e9 are none."""
    match = _NUMBER.fullmatch(region)
    return float(match[1]) if match and len(match[1]) <= 16 else None


_DIMENSION_LABEL = re.compile(
    rf"(?:^|[,;|/]){_DECORATION}({'|'.join(DIMENSIONS)})[ ]score{_DECORATION}(?:\(1-5\))?[\s*_`]*:",
    re.IGNORECASE | re.MULTILINE,
)
_FINAL_LABEL = re.compile(rf"(?:^|[,;|/]){_DECORATION}(final)[ ]score[\s*_`]*:", re.IGNORECASE | re.MULTILINE)
_IMAGE_LABEL = re.compile(
    rf"(?:^|[,;|/]){_DECORATION}(?:edited )?image[ ]([12])[\s*_`]*:", re.IGNORECASE | re.MULTILINE
)


def _labelled(text: str, label: re.Pattern[str], *, whole_block: bool = False) -> list[tuple[str, str]]:
    """(name, what stands after its label): up to the next label, and to the end of the line unless ``whole_block``."""
    matches = list(label.finditer(text))
    ends = [*(match.start() for match in matches[1:]), len(text)]
    regions = [(match[1].lower(), text[match.end() : end]) for match, end in zip(matches, ends, strict=False)]
    return [(name, region if whole_block else region.partition("\n")[0]) for name, region in regions]


def _last_numbers(text: str, label: re.Pattern[str]) -> dict[str, float]:
    """The number in [1, 5] after the last occurrence of each label; an earlier one never stands in for a bad last."""
    last = dict(_labelled(text, label))
    numbers = {name: _number(region) for name, region in last.items()}
    return {name: value for name, value in numbers.items() if value is not None and 1 <= value <= 5}


def _all_dimensions(values: Mapping[str, float]) -> Parsed:
    missing = [name for name in DIMENSIONS if name not in values]
    return Parsed(values, problem=f"no usable number for {', '.join(missing)}" if missing else "")


def _totals(text: str) -> tuple[float, float] | None:
    """The two totals that a Think answer writes down as ``Image 1: 7+8+6=21``; None where they cannot be read."""
    thoughts = text[: max(text.lower().rfind("</think>"), 0)]
    start = thoughts.lower().rfind("total score")
    sums = {}
    for line in thoughts[start:].splitlines() if start >= 0 else []:
        match = _IMAGE.search(line)
        total = _number(line[match.end() :].rpartition("=")[2]) if match else None
        if match and total is not None:
            sums[match[1]] = total
    return (sums["1"], sums["2"]) if len(sums) == 2 else None


def _strict_json(text: str) -> dict[str, Any]:
    """One JSON object and nothing else; NaN, repeated keys and text around it are errors."""
    body = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", body, re.DOTALL | re.IGNORECASE)
    answer = json.loads(fenced[1] if fenced else body, parse_constant=_no_constant, object_pairs_hook=_unique)
    if not isinstance(answer, dict):
        raise ValueError("not an object")
    return answer


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _category(category: Any) -> float:
    """The share of one category of a Flex answer, after checking all of it."""
    if not isinstance(category, dict):
        raise ValueError("a category is no object")
    _text(category, "name"), _text(category, "cat_reason")
    for dimension in _list(category, "dims", 3, 5):
        if not isinstance(dimension, dict):
            raise ValueError("a dimension is no object")
        for key in ("name", "reason_1", "reason_2"):
            _text(dimension, key)
        scores = [_real(dimension.get(key), 0, 10) for key in ("score_1", "score_2")]
        if abs(sum(scores) - 10) > 10 * SUM_TOLERANCE:
            raise ValueError(f"scores of a dimension add up to {sum(scores):g}, not to 10")
    return _share(category, "cat_winner")


def _share(item: dict[str, Any], key: str) -> float:
    winner = item.get(key)
    if not isinstance(winner, str) or winner.strip() not in _WINNERS:
        raise ValueError(f"{key} is neither Image 1 nor Image 2")
    return _WINNERS[winner.strip()]


def _list(item: dict[str, Any], key: str, fewest: int, most: int) -> list[Any]:
    found = item.get(key)
    if not isinstance(found, list) or not fewest <= len(found) <= most:
        raise ValueError(f"{key} is not a list of {fewest} to {most}")
    return found


def _text(item: dict[str, Any], key: str) -> str:
    found = item.get(key)
    if not isinstance(found, str):
        raise ValueError(f"{key} is no text")
    return found


def _real(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"a score is no number between {low:g} and {high:g}")
    return float(value)
