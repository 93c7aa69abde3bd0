"""Strict reading: every form of answer, and that no text whatever crashes a parser or makes up a number."""

from __future__ import annotations

import json
import math
import re
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_models.unified_reward.parsers import (
    parse_dimensions,
    parse_edit_point,
    parse_edit_scores,
    parse_final_score,
    parse_flex,
    parse_shares,
    parse_think,
    parse_verdict,
)

RANGES = {
    parse_verdict: (0, 1),
    parse_think: (0, 1),
    parse_shares: (0, 1),
    parse_flex: (0, 1),
    parse_final_score: (1, 5),
    parse_dimensions: (1, 5),
    parse_edit_scores: (-math.inf, math.inf),
    parse_edit_point: (0, 25),
}
THOUGHTS = "<think>Total score:\nImage 1: 7+8+6=21\nImage 2: 6+8+6=20\n</think>"


def overall(parsed) -> float | None:
    assert bool(parsed.problem) == (not parsed.values)
    return parsed.values.get("overall")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Image 1 is better.", 1),
        ("Image 1 is better than Image 2.", 1),
        ("Image 2 is better than Image 1.", 0),
        ("The light of the second is warmer.\n**IMAGE 2** is\nbetter!", 0),
        ("Both images are equally good.", 0.5),
        ("<think>Image 2 is better at first.</think> Image 1 is better", 1),
        ("no tag opened, Image 2 is better </think>\nImage 1 is better", 1),
        ("<answer>Image 1 is better</answer> so it is, and not: Image 2 is better", 1),
        ("<answer>Image 1 is better, no, Image 2 is better</answer>", None),
        ("Image 1 is better. The images are equally good.", None),
        ("<think>Image 1 is better", None),
        ("<answer>Image 1 is better", None),
        ("<answer></answer>", None),
        ("Image 11 is better", None),
        ("Image 1 is betterment", None),
        ("Image 1 looks better", None),
        ("subimage 1 is better", None),
        ("Image 1", None),
        ("I doubt that Image 1 is better.", None),
        ("It isn't true that Image 1 is better", None),
        ("Neither Image 1 is better nor Image 2.", None),
        ("Whether Image 2 is better depends on taste.", None),
        ("The two are not equally good; the second wins.", None),
        ("No defects in the second. Image 2 is better.", 0),
        ("Not sharp, no colour, but Image 2 is better", 0),
        ("", None),
    ],
)
def test_verdicts_in_free_text(text, share):
    assert overall(parse_verdict(text)) == share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>Image 2 is better at first...</think><answer>Image 1 is better</answer>", 1),
        ("<answer>\nImage 2 is better.\n</answer>", 0),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", 0),
        ("<think><answer>Image 1 is better</answer></think>", None),
        ("<think><answer>Image 1 is better</answer>", None),
        ("<answer>Image 1 is better, no, Image 2 is better</answer>", None),
        ("<answer>Both images are equally good.</answer>", None),
        ("Both images are equally good.", None),
        ("Image 1 is better.", None),
        ("<answer>Image 1 is better", None),
        ("<answer></answer>", None),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_think(text, share):
    assert overall(parse_think(text)) == share


def test_think_sums_speak_for_or_against_the_verdict():
    assert parse_think(THOUGHTS + "<answer>Image 1 is better</answer>").consistent is True
    assert parse_think(THOUGHTS + "<answer>Image 2 is better</answer>").consistent is False
    assert parse_think(THOUGHTS.replace("21", "20") + "<answer>Image 1 is better</answer>").consistent is False
    assert parse_think("<answer>Image 1 is better</answer>").consistent is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("dog (object): 1.0\nFinal Score: 3.75", 3.75),
        ("**Final Score:** 4.\n", 4),
        ("Final Score: 2\nFinal Score: 3", 3),
        ("Final Score: 7", None),
        ("Final Score: 3\nFinal Score: 7", None),
        ("Final Score: x\nfinal", None),
        ("Final Score: 4/5", None),
        ("Final Score: 3e0", None),
        ("Final Score: 3.75.2", None),
        ("Final Score: 3,5", None),
        ("Final Score: nan", None),
        ("Final Score: -3", None),
        ("Final Score: \u0663", None),
        ("Final Score: " + "9" * 5000, None),
        ("Score: 3", None),
        ("", None),
    ],
)
def test_final_scores(text, score):
    assert overall(parse_final_score(text)) == score


def test_dimensions_come_one_by_one():
    text = "Alignment Score (1-5): 3.4\nCoherence Score (1-5): 2.9\nStyle Score (1-5): {}"
    assert parse_dimensions(text.format("4")).values == {"alignment": 3.4, "coherence": 2.9, "style": 4}
    parsed = parse_dimensions(text.format("nan"))
    assert parsed.values == {"alignment": 3.4, "coherence": 2.9}
    assert "style" in parsed.problem
    assert "style" not in parse_dimensions(text.format("5.5")).values
    echoed = "Alignment Score (1-5): X\nCoherence Score (1-5): X\nStyle Score (1-5): X"
    assert parse_dimensions(echoed).values == {}
    assert parse_dimensions(text.format("4") + "\n" + echoed).values == {}
    line = "Alignment Score (1-5): 3, Coherence Score (1-5): 2, Style Score (1-5): 1"
    assert parse_dimensions(line).values == {"alignment": 3, "coherence": 2, "style": 1}


def shares(first: str, second: str) -> str:
    blocks = (f"{name} Score:\n  Image 1: {first}\n  Image 2: {second}" for name in ("Alignment", "Coherence", "Style"))
    return "\n".join(blocks)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (shares("0.62", "0.38"), 0.62),
        (shares("0.62 / ", "0.38").replace("\n  Image 2", "Image 2"), 0.62),
        (shares("0.615", "0.395"), 0.615 / 1.01),
        (shares("0.62", "0.62"), None),
        (shares("1.62", "-0.62"), None),
        (shares("62", "38"), None),
        (shares("0.62", "."), None),
    ],
)
def test_shares_have_to_add_up(text, share):
    parsed = parse_shares(text)
    expected = {} if share is None else {name: pytest.approx(share) for name in ("alignment", "coherence", "style")}
    assert parsed.values == expected
    assert bool(parsed.problem) == (share is None)


def test_a_share_of_one_dimension_never_stands_for_another():
    unfinished = "Alignment Score:\nImage 1: 0.2\nCoherence Score:\nImage 2: 0.8\n"
    parsed = parse_shares(unfinished + "Style Score:\nImage 1: 0.5\nImage 2: 0.5")
    assert set(parsed.values) == {"style"}
    spoilt = shares("0.62", "0.38") + "\nStyle Score:\nImage 1: 0.9\nImage 2: 0.9"  # the last block of a name counts
    assert set(parse_shares(spoilt).values) == {"alignment", "coherence"}


def flex(**changes) -> dict:
    dims = [{"name": n, "reason_1": "a", "reason_2": "b", "score_1": 6, "score_2": 4} for n in "xyz"]
    category = {"name": "alignment", "dims": dims, "cat_reason": "r", "cat_winner": "Image 1"}
    return {"prompt": "p", "categories": [category] * 3, "reason": "r", "winner": "Image 1"} | changes


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (json.dumps(flex()), 1),
        (json.dumps(flex(winner="Image 2")), 0),
        ("<think>hm</think>\n```json\n" + json.dumps(flex(), indent=1) + "\n```", 1),
        (json.dumps(flex(winner="Image 1/2")), None),
        (json.dumps(flex(winner="Image 3")), None),
        (json.dumps(flex(winner=1)), None),
        (json.dumps(flex(categories=[])), None),
        (json.dumps(flex(categories=flex()["categories"] * 2)), None),
        (json.dumps(flex()).replace('"score_2": 4', '"score_2": 5', 1), None),
        (json.dumps(flex()).replace('"score_1": 6', '"score_1": true', 1), None),
        (json.dumps(flex()).replace('"score_1": 6', '"score_1": NaN', 1), None),
        (json.dumps(flex()).replace('"score_1": 6', '"score_1": 1e999', 1), None),
        (json.dumps(flex()).replace('"cat_winner": "Image 1"', '"cat_winner": "both"', 1), None),
        (json.dumps(flex())[:-1] + ', "winner": "Image 2"}', None),
        ("Here it is: " + json.dumps(flex()), None),
        (json.dumps(flex())[:-2], None),
        (json.dumps([flex()]), None),
        ("[" * 100_000, None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_flex(text, share):
    assert overall(parse_flex(text)) == share


def test_flex_categories_speak_for_or_against_the_winner():
    assert parse_flex(json.dumps(flex())).consistent is True
    assert parse_flex(json.dumps(flex(winner="Image 2"))).consistent is False


def test_edit_forms():
    assert parse_edit_scores("Image 1: -1.25\nImage 2: 2").values == {"image 1": -1.25, "image 2": 2}
    assert parse_edit_scores("Image 1: -1.25\nImage 2: ?").problem
    assert parse_edit_point('{"reasoning": "r", "score": [20, 3.5]}').values == {"following": 20, "quality": 3.5}
    assert parse_edit_point('{"score": [20, 26]}').problem
    assert parse_edit_point('{"score": [20]}').problem


_PIECES = st.sampled_from(
    ["Image 1", "Image 2", " is better", "equally good", "<answer>", "</answer>", "<think>", "</think>", "Final Score:"]
    + [
        "Alignment Score (1-5):",
        "Coherence Score:",
        "Style Score (1-5): ",
        "Image 1: ",
        "Image 2:",
        "Total score:",
        "=",
    ]
    + [
        "\n",
        " ",
        "/",
        "*",
        "-",
        "0.5",
        "3",
        "3.75",
        "nan",
        "inf",
        "1e5",
        "{",
        "}",
        '"winner": "Image 1"',
        "```json",
        "[1, 2]",
    ]
    + [json.dumps(flex()), '{"score": [1, 2]}']
)
ANSWERS = st.one_of(st.text(max_size=300), st.lists(_PIECES | st.text(max_size=5), max_size=40).map("".join))


@pytest.mark.parametrize("parse", RANGES, ids=lambda parse: parse.__name__)
@settings(max_examples=80)
@given(text=ANSWERS)
def test_no_text_crashes_a_parser_or_makes_up_a_number(parse, text):
    parsed = parse(text)
    low, high = RANGES[parse]
    assert all(math.isfinite(value) and low <= value <= high for value in parsed.values.values())
    assert parsed.values or parsed.problem
    if parse in (parse_verdict, parse_think, parse_flex) and parsed.values:
        said = re.sub(r"[\W_]+", " ", text.casefold())
        assert {1.0: "image 1", 0.0: "image 2", 0.5: "equally good"}[parsed.values["overall"]] in said
    if parse in (parse_final_score, parse_dimensions, parse_edit_scores):
        stated = {float(number) for number in re.findall(r"[-+]?[0-9]+(?:\.[0-9]+)?", text)}
        assert set(parsed.values.values()) <= stated


@settings(max_examples=100)
@given(score=st.decimals(min_value=-9, max_value=15, places=2), before=st.text(max_size=50))
def test_a_stated_number_is_read_exactly_or_not_at_all(score, before):
    parsed = parse_final_score(before.replace("<", "") + f"\nFinal Score: {score}")
    assert overall(parsed) == (float(score) if 1 <= score <= 5 else None)


def swapped(text: str) -> str:
    """The same answer about the pictures in the other order."""
    return re.sub(r"(image )([12])", lambda match: match[1] + "21"[int(match[2]) - 1], text, flags=re.IGNORECASE)


@pytest.mark.parametrize("parse", [parse_verdict, parse_think, parse_shares, parse_flex], ids=lambda p: p.__name__)
@settings(max_examples=80)
@given(text=ANSWERS)
def test_no_parser_prefers_a_place(parse, text):
    one, other = parse(text), parse(swapped(text))
    assert one.values.keys() == other.values.keys()
    assert all(one.values[name] + other.values[name] == pytest.approx(1) for name in one.values)


@pytest.fixture
def in_time():
    """A reader whose work grows with the square of the text needs hours here; one pass needs a second."""

    def late(*_):
        raise AssertionError("the parser does not come to an end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


REPEATED = [
    "\n-",
    "-",
    "/-",
    "Image 1: ",
    "image 1 is better ",
    "not ",
    "Alignment Score: ",
    "<answer>",
    "</think>",
    "{",
]


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("parse", RANGES, ids=lambda parse: parse.__name__)
def test_a_judge_that_repeats_itself_without_end_is_read_in_one_pass(parse):
    for piece in REPEATED:
        parse(piece * (400_000 // len(piece)))
