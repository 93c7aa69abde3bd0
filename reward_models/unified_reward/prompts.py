"""The questions a judge is asked, as data: what form of answer each asks for, its default wording, how it is read.

The wording is this package's own. The markers of the answers (``Image 1 is better``, ``Final Score:`` ...) are those
the checkpoints were trained to write. Scores depend on the exact wording: for numbers comparable to published ones
give the model's official prompt as a text file (see docs/unified-reward.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import RewardModelError
from .parsers import (
    DIMENSIONS,
    OVERALL,
    Parsed,
    parse_dimensions,
    parse_final_score,
    parse_flex,
    parse_shares,
    parse_think,
    parse_verdict,
)

PLACEHOLDER = "{prompt}"

_VERDICT_WORDS = re.compile(r"(image)\W*[12]\W+is\W+better\b", re.IGNORECASE)
_WINNER_WORDS = re.compile(r'"winner"\s*:\s*"\s*(Image) [12]\s*"')


@dataclass(frozen=True)
class Form:
    """One kind of question."""

    name: str
    task: Literal["pair", "point"]
    parse: Callable[[str], Parsed]
    text: str
    """The question; ``{prompt}`` stands for the picture's prompt. Pictures are shown before the text."""
    dimensions: tuple[str, ...] = (OVERALL,)
    max_tokens: int = 1024
    verdict: re.Pattern[str] | None = None
    """Finds the verdict in an answer; its group 1 is the word before the number of the picture."""
    direct: bool = False
    """Whether the verdict can be the very first thing that is said."""

    def question(self, prompt: str) -> str:
        return self.text.replace(PLACEHOLDER, prompt)


_VERDICT = """\
You are shown two pictures, Image 1 and Image 2, made for the same caption. Judge them by two things: how well each \
shows what the caption says, and how good its overall quality is (clarity, detail, composition, absence of defects).

Caption: {prompt}

Compare both pictures on both points without letting their order matter. End with exactly one of these lines:
Image 1 is better
Image 2 is better
Both images are equally good
"""

_SHARES = """\
You are shown two pictures, Image 1 and Image 2, made for the same caption. On each of three dimensions divide one \
point between them: two numbers between 0 and 1 that add up to 1, the larger for the better picture.

Alignment: objects, attributes, counts and relations of the caption are shown.
Coherence: the picture is free of defects, distortions and impossible parts.
Style: it is pleasing, whatever the caption says.

Caption: {prompt}

Answer with exactly these lines, a number in place of each dot:
Alignment Score:
  Image 1: .
  Image 2: .
Coherence Score:
  Image 1: .
  Image 2: .
Style Score:
  Image 1: .
  Image 2: .
"""

_THINK = """\
You are shown two pictures, Image 1 and Image 2, made for this caption: \u300c{prompt}\u300d

Think first, between <think> and </think>. Rate both pictures from 1 to 10 on semantic consistency with the caption, \
on aesthetics and on authenticity, and on up to two more dimensions that matter for this caption. Three lines for each:
dimension name:
Image 1 (x/10) - reason;
Image 2 (y/10) - reason
Then write the sums out:
Total score:
Image 1: a+b+c=total
Image 2: a+b+c=total
The picture with the larger total wins; there are no ties. After </think> name it in one of these two ways:
<answer>Image 1 is better</answer>
<answer>Image 2 is better</answer>
"""

_FLEX = """\
You are shown two pictures, Image 1 and Image 2, made for this caption:
{prompt}

Compare them in three categories: semantic alignment, image quality and realism, aesthetics and artistry. Add a fourth \
if the caption calls for one. In each category choose 3 to 5 dimensions that matter for this caption; on each divide \
10 points between the pictures. Name the better picture of each category and of all.

Answer with one JSON object and nothing else. Its keys: "prompt" (the caption), "categories", "reason", "winner".
"categories" is a list of objects with the keys "name", "dims", "cat_reason", "cat_winner".
"dims" is a list of objects with the keys "name", "reason_1", "reason_2", "score_1", "score_2"; the scores add up to 10.
"winner" and "cat_winner" are the name of one picture as written above, with its number.
"""

_FINAL = """\
You are shown a picture made for a caption. Take the caption apart into its elements (objects, attributes, actions, \
counts, places) and rate how well the picture shows each, one line per element:
element (type): rating
Then rate the whole picture from 1 (bad) to 5 (excellent) by its agreement with the caption and by its quality.

Caption: {prompt}

End with this line, x a number from 1 to 5:
Final Score: x
"""

_DIMENSIONS = """\
You are shown a picture made for a caption. Rate it from 1 (bad) to 5 (excellent) on three dimensions:

Alignment: objects, attributes, counts and relations of the caption are shown.
Coherence: the picture is free of defects, distortions and impossible parts.
Style: it is pleasing, whatever the caption says.

Caption: {prompt}

Answer with exactly these lines, X a number from 1 to 5:
Alignment Score (1-5): X
Coherence Score (1-5): X
Style Score (1-5): X
"""

FORMS = {
    form.name: form
    for form in (
        Form("verdict", "pair", parse_verdict, _VERDICT, verdict=_VERDICT_WORDS, direct=True),
        Form("shares", "pair", parse_shares, _SHARES, DIMENSIONS),
        Form("think", "pair", parse_think, _THINK, max_tokens=4096, verdict=_VERDICT_WORDS),
        Form("flex", "pair", parse_flex, _FLEX, max_tokens=4096, verdict=_WINNER_WORDS),
        Form("final-score", "point", parse_final_score, _FINAL),
        Form("dimensions", "point", parse_dimensions, _DIMENSIONS, DIMENSIONS),
    )
}


@dataclass(frozen=True)
class Family:
    """Checkpoints that answer alike. The first form of a task is the default one."""

    model: str
    pair: tuple[str, ...]
    point: tuple[str, ...] = ()


FAMILIES = {
    "7b": Family("CodeGoat24/UnifiedReward-qwen-7b", ("verdict",), ("final-score",)),
    "2.0": Family("CodeGoat24/UnifiedReward-2.0-qwen-7b", ("verdict", "shares"), ("dimensions", "final-score")),
    "think": Family("CodeGoat24/UnifiedReward-Think-qwen-7b", ("think",)),
    "flex": Family("CodeGoat24/UnifiedReward-Flex-qwen3vl-8b", ("flex",)),
}


def choose_form(offered: tuple[str, ...], name: str | None, file: str | Path | None) -> Form | None:
    """The form called ``name`` (None: the first offered), its wording taken from ``file`` when one is given.

    Raises:
        RewardModelError: the family has no such form, or the file cannot be read or lacks ``{prompt}``.
    """
    if not offered:
        if name or file:
            raise RewardModelError("this family only compares pairs; leave point_form and point_prompt out.")
        return None
    if name is not None and name not in offered:
        raise RewardModelError(f"this family has no form {name!r}; it has {', '.join(offered)}.")
    form = FORMS[name or offered[0]]
    if file is None:
        return form
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardModelError(f"cannot read the prompt file {file}: {error}") from error
    if PLACEHOLDER not in text:
        raise RewardModelError(f"the prompt file {file} has no {PLACEHOLDER}: write it where the caption belongs.")
    return replace(form, text=text)
