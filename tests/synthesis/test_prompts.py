"""Prompts: from anywhere, normalised, without repeats, split so that none leaks."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.errors import ConfigError, DataError
from diffalign.evaluation.prompts import read_prompts
from diffalign.shapes import parse
from diffalign.synthesis.config import GenerationConfig
from diffalign.synthesis.prompts import is_held_out, normalise, plan_prompts, prompt_key

RTL = "\u05d7\u05ea\u05d5\u05dc \u200f\u0634\u0645\u0633"  # Hebrew, a right-to-left mark, Arabic


def config(prompts, **changes):
    values = {"output_dir": "x", "prompts": prompts, "pipelines": [{"images": 2}], "reward_models": ["shapes"]}
    return GenerationConfig(**(values | changes))


def write(path, texts):
    """A file of prompts in the form that its suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"caption": text}) + "\n" for text in texts))
    elif path.suffix == ".csv":
        lines = "".join('{},"{}"\n'.format(n, text.replace('"', '""')) for n, text in enumerate(texts))
        path.write_text("n,caption\n" + lines, encoding="utf-8")
    else:
        pq.write_table(pa.table({"caption": texts, "n": list(range(len(texts)))}), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, suffix):
    texts = ['a "quoted", cat', "caf\u00e9 \U0001f468\u200d\U0001f373", RTL]
    plan = plan_prompts(config(write(tmp_path / f"p.{suffix}", texts), prompt_column="caption"))
    assert plan.train == texts and not plan.dropped


def test_bad_prompts_are_left_out_and_listed(tmp_path):
    texts = [
        "a cat",
        "",
        "A  Cat.",
        "   ",
        "x" * 10_000,
        RTL,
        "cafe\u0301",
        "caf\u00e9",
        "\ud800 half",
        "tab\tand\x00nul",
    ]
    plan = plan_prompts(config(write(tmp_path / "p.jsonl", texts), prompt_column="caption"))
    assert plan.train == ["a cat", RTL, "caf\u00e9", "tab andnul"]
    reasons = [reason for _, reason in plan.dropped]
    assert reasons == [
        "empty", "repeated", "empty", "longer than 2000 characters", "repeated", "not valid Unicode",
    ]  # fmt: skip
    assert str(plan) == (
        "4 prompts, 0 held out, 2 empty, 2 repeated, 1 longer than 2000 characters, 1 not valid Unicode"
    )


def test_held_out_prompts_never_leak_and_never_move(tmp_path):
    texts = [f"a cat number {n}" for n in range(400)]
    plan = plan_prompts(config(write(tmp_path / "p.txt", texts), held_out=0.2))
    assert 50 < len(plan.held_out) < 110 and len(plan.train) + len(plan.held_out) == 400
    disguised = [f"  {text.upper()} . " for text in reversed(texts)]
    again = plan_prompts(config(write(tmp_path / "q.txt", disguised), held_out=0.2, seed=5))
    assert {prompt_key(p) for p in again.held_out} == {prompt_key(p) for p in plan.held_out}
    assert all(is_held_out(prompt, 0.5) for prompt in plan.held_out)  # a larger share holds the smaller one


def test_sources_add_up_and_exclusions_hold(tmp_path):
    first, second = write(tmp_path / "a.txt", ["one", "two"]), write(tmp_path / "b.txt", ["Two!", "three", "four"])
    excluded = write(tmp_path / "c.txt", ["FOUR"])
    plan = plan_prompts(config([first, second], exclude_prompts=excluded))
    assert plan.train == ["one", "two", "three"]
    assert plan_prompts(config([first, second], max_prompts=2)).train == ["one", "two"]


def test_the_grammar_of_shapes_is_a_source():
    plan = plan_prompts(config("shapes", max_prompts=50))
    assert len(plan.train) == 50 and not any(parse(prompt).held_out for prompt in plan.train)
    assert not {prompt_key(p) for p in plan.train} & {prompt_key(p) for p in read_prompts("shapes:heldout")}
    plain = plan_prompts(config("shapes:plain", max_prompts=50))
    assert plain.train and all(parse(prompt).background is None for prompt in plain.train)


@pytest.mark.parametrize(
    ("name", "content", "error", "word"),
    [
        ("p.jsonl", "{broken", DataError, "line 1: no JSON"),
        ("p.jsonl", '{"caption": 3}', DataError, "expected a text in 'caption', got 3"),
        ("p.csv", "captions\na", DataError, "Did you mean prompt_column=captions"),
        ("p.csv", "caption\n" + "x" * 200_000, DataError, "p.csv.*field larger than field limit"),
        ("p.parquet", "no parquet", DataError, "not a readable Parquet file"),
        ("p.txt", "\n\n", DataError, "expected prompts to draw, got 0 prompts, 0 held out, 3 empty"),
        ("p.docx", "x", ConfigError, "expected a .txt, .jsonl, .csv, .parquet file"),
        ("/nowhere/p.txt", None, ConfigError, "no file, no hub id"),
        ("nobody/nothing", None, DataError, "the hub's data set cannot be read"),
        ("shapes", None, ConfigError, "max_prompts"),
    ],
)
def test_bad_sources_are_named(tmp_path, name, content, error, word):
    if content is not None:
        (tmp_path / name).write_text(content)
        name = str(tmp_path / name)
    with pytest.raises(error, match=word):
        plan_prompts(config(name, prompt_column="caption"))


def test_normalising_keeps_what_means_something():
    assert normalise("  a\u00a0 b\u2028c\r\n") == "a b c"
    assert normalise(RTL) == RTL
    assert normalise("\x00 a \x07 b \x1b") == "a b"  # nor does a control character leave its spaces behind


def test_only_line_feeds_end_a_prompt_of_an_evaluation_file(tmp_path):
    text = "one\u2028two\u0085three"
    (tmp_path / "p.jsonl").write_text(json.dumps(text, ensure_ascii=False) + "\r\n" + json.dumps("a cat"), "utf-8")
    (tmp_path / "p.txt").write_text(text + "\na cat\n", "utf-8")
    entry = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": text}
    (tmp_path / "geneval.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", "utf-8")
    for source in ("p.jsonl", "p.txt"):
        assert read_prompts(str(tmp_path / source)) == ["one two three", "a cat"]
    assert read_prompts(f"geneval:{tmp_path / 'geneval.jsonl'}") == ["one two three"]
    assert read_prompts(f"t2i-compbench:{tmp_path / 'p.txt'}") == ["one two three", "a cat"]
