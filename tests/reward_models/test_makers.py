"""Scores that the makers' own code gave on the very same small checkpoints and pictures.

``makers.json`` was written once, with the makers' packages and a transformers of their time: their classes, at the size
of :mod:`.checkpoints`, loaded the files that ours load. None of their code is needed here. A null is a picture that
theirs cannot score in this way: HPSv2 leaves one unpadded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from .checkpoints import PROMPTS, pictures

MAKERS = json.loads((Path(__file__).parent / "makers.json").read_text())
TOLERANCE = {  # absolute, fp32; the scores' sizes are in docs/reward-models.md
    "aesthetic": 1e-5,
    "hpsv2": 1e-5,
    "hpsv3": 1e-4,
    "imagereward": 2e-4,
    "mps": 5e-4,
    "pickscore": 5e-4,
    "vqascore": 1e-6,
}


@pytest.mark.parametrize("name", TOLERANCE)
def test_scores_are_those_of_the_makers_code(name, load_scorer):
    theirs = [math.nan if score is None else score for score in MAKERS[name]["scores"]]
    scorer = load_scorer(name, **({"antialias": True} if name == "hpsv2" else {}))
    ours = scorer.score(pictures(), PROMPTS).tolist()
    compared = [(a, b) for a, b in zip(ours, theirs, strict=True) if not math.isnan(b)]
    assert len(compared) >= 7
    assert max(abs(a - b) for a, b in compared) < TOLERANCE[name]
    assert max(b for _, b in compared) - min(b for _, b in compared) > 100 * TOLERANCE[name]
