"""Pictures in which captions hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffalign.shapes import parse, render


def renders(captions: Sequence[str], seed: int = 0) -> list[Image.Image]:
    return [render(parse(caption), np.random.default_rng([seed, n])) for n, caption in enumerate(captions)]
