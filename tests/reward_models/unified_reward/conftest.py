"""One small judge, taught once for all tests."""

from __future__ import annotations

import pytest
from PIL import Image

from .tiny_vlm import save, teach, tiny_qwen2_vl

RED, BLUE = Image.new("RGB", (16, 16), (230, 20, 20)), Image.new("RGB", (16, 16), (20, 20, 230))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Qwen2-VL that was taught to prefer red pictures, to score them, and to tell red from blue."""
    model, processor = tiny_qwen2_vl()
    lessons = [
        ([RED, BLUE], "red?", "Image 1 is better"),
        ([BLUE, RED], "red?", "Image 2 is better"),
        ([RED, RED], "red?", "Both images are equally good"),
        ([RED], "rate red", "Final Score: 5"),
        ([BLUE], "rate red", "Final Score: 1"),
        ([RED], "is it red", "Yes"),
        ([BLUE], "is it red", "No"),
    ]
    teach(model, processor, lessons)
    return save(tmp_path_factory.mktemp("qwen2-vl"), model, processor)
