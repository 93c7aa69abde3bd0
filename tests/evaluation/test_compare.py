"""Base against aligned on real tiny pipelines: LoRA folders, pipeline folders, reports, and what must be refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image

from diffalign.errors import CheckpointError, ConfigError, DataError
from diffalign.evaluation import SamplingSettings, compare, compare_pictures, evaluate, write_report
from diffalign.evaluation.html import headline
from diffalign.evaluation.lora import find_weights, lora_loaded
from diffalign.evaluation.prompts import read_prompts
from diffalign.evaluation.selection import most_changed, random_pairs
from diffalign.evaluation.statistics import compare_paired
from diffalign.pipelines import adapter_for
from diffalign.pipelines.export import save_lora
from diffalign.shapes import HELD_OUT, parse
from diffalign.synthesis import generate_images
from reward_models import load_reward_model
from tests.tiny import tiny_sd, tiny_sdxl

SAMPLING = SamplingSettings(steps=2, guidance=2.0, batch_size=4)
PROMPTS, SEEDS = ["a cat", "a <b>dog</b>", "鸟"], [0, 3]


def red(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def is_dark(images, prompts):
    return [
        None if prompt == "鸟" else float(np.asarray(i).mean() < 128) for i, prompt in zip(images, prompts, strict=True)
    ]


SCORERS = [load_reward_model(red), load_reward_model(is_dark)]


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    """A run's folder with a LoRA that changes pictures, and the pictures of the pipeline that carries it."""
    pipeline = tiny_sdxl()
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("run")
    save_lora(adapter_for(pipeline), folder / "final")
    (folder / "training_report.json").write_text(json.dumps({"method": "dpo"}))
    return folder, draw(pipeline)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def comparison():
    """Made-up pictures: red under seed 0 grows by the prompt's number."""
    levels = [10, 10, 20, 20, 30, 30], [10, 10, 21, 20, 28, 30]
    base, aligned = ([Image.new("RGB", (48, 32), (v, v, v)) for v in side] for side in levels)
    return compare_pictures(PROMPTS, SEEDS, base, aligned, SCORERS, sampling=SAMPLING)


def draw(pipeline):
    prompts = [prompt for prompt in PROMPTS for _ in SEEDS]
    return generate_images(pipeline, prompts, SEEDS * len(PROMPTS), steps=2, guidance=2.0)


def gap(first, second):
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(first, second, strict=True))


def test_a_lora_folder_is_compared_on_one_loaded_base_which_is_left_as_it_was(lora_folder):
    folder, expected = lora_folder
    pipeline = tiny_sdxl()
    plain, layers = draw(pipeline), [name for name, _ in pipeline.unet.named_modules()]
    result = compare(pipeline, folder, PROMPTS, SEEDS, SCORERS, sampling=SAMPLING)
    assert gap(result.base_pictures, plain) <= 1
    assert gap(result.aligned_pictures, expected) <= 1
    assert gap(plain, expected) > 3
    assert gap(draw(pipeline), plain) == 0
    assert [name for name, _ in pipeline.unet.named_modules()] == layers  # no wrappers of peft's stay
    assert result.results["red"].n == 6
    assert (result.results["is_dark"].n, result.results["is_dark"].missing) == (4, 2)


def test_a_model_against_itself_is_a_tie_everywhere():
    pipeline = tiny_sd()
    result = compare(pipeline, pipeline, PROMPTS, SEEDS, SCORERS, sampling=SAMPLING).results["red"]
    assert (result.ties, result.difference.mean, result.win_rate.mean) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize("family", ["sdxl into sd", "sd into sdxl"])
def test_a_lora_of_another_architecture_is_refused(lora_folder, family, tmp_path):
    if family == "sdxl into sd":
        pipeline, file = tiny_sd(), lora_folder[0] / "final" / "pytorch_lora_weights.safetensors"
    else:
        other = tiny_sd()
        other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        pipeline, file = tiny_sdxl(), save_lora(adapter_for(other), tmp_path)[0]
    with pytest.raises(CheckpointError, match="does not fit"), lora_loaded(pipeline, file):
        pass
    assert not getattr(pipeline.unet, "peft_config", None)


def test_a_file_without_lora_weights_is_refused(base_folder, tmp_path):
    weights = next((base_folder / "unet").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="no LoRA weights"), lora_loaded(tiny_sdxl(), weights):
        pass
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="cannot read"), lora_loaded(tiny_sdxl(), tmp_path / "cut.safetensors"):
        pass


def test_finding_weights_says_what_a_folder_holds(tmp_path, base_folder, lora_folder):
    assert find_weights(base_folder) == ("pipeline", base_folder)
    assert find_weights(lora_folder[0])[0] == "lora"
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="notes.txt"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "nowhere")


def test_evaluate_writes_a_report_for_a_lora_run(lora_folder, base_folder, tmp_path):
    report = evaluate(
        str(base_folder),
        lora_folder[0],
        PROMPTS,
        output_dir=tmp_path,
        seeds=2,
        steps=2,
        guidance=2.0,
        reward_models=SCORERS,
        device="cpu",
    )
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (report["method"], report["prompts"], report["seeds"], report["pairs"]) == ("dpo", 3, 2, 6)
    assert list(report["scores"]) == ["red", "is_dark"]
    score = report["scores"]["red"]
    assert {"base", "aligned", "difference", "win_rate"} <= set(score)
    assert {"mean", "ci95", "n"} == set(score["difference"]) and {"value", "ci95", "ties"} <= set(score["win_rate"])
    assert {"load", "generate_base", "generate_aligned", "score"} == set(report["seconds"])
    assert len(list((tmp_path / "pictures" / "aligned").glob("*.png"))) == 6
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    base, aligned = ([record[side]["red"] for record in records] for side in ("base", "aligned"))
    again = compare_paired(base, aligned, [record["prompt"] for record in records])
    assert again.difference.mean == pytest.approx(score["difference"]["mean"])
    assert records[4]["base"]["is_dark"] is None


def test_evaluate_takes_a_whole_pipeline(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "same")
    report = evaluate(
        str(base_folder),
        tmp_path / "same",
        PROMPTS,
        output_dir=tmp_path,
        seeds=1,
        steps=1,
        guidance=1.0,
        reward_models=SCORERS,
        device="cpu",
        num_prompts=2,
        method="same",
    )
    assert (report["method"], report["pairs"]) == ("same", 2)
    assert report["scores"]["red"]["win_rate"]["value"] == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"aligned": "nowhere"}, CheckpointError, "does not exist"),
        ({"model": "./nowhere"}, ConfigError, "nowhere"),
        ({"prompts": []}, DataError, "no prompts"),
        ({"prompts": "shapes:heldouts"}, ConfigError, "shapes:heldout"),
        ({"reward_models": ["nothing"]}, ConfigError, "nothing"),
        ({"seeds": 0}, ConfigError, "seeds"),
        ({"guidance": [3.0, float("nan")]}, ConfigError, "guidance"),
        ({"reward_models": []}, ConfigError, "reward models"),
    ],
)
def test_bad_input_is_one_clear_error(changes, error, word, lora_folder, base_folder, tmp_path):
    given = {"model": str(base_folder), "aligned": lora_folder[0], "prompts": ["a"], "reward_models": SCORERS} | changes
    with pytest.raises(error, match=word):
        evaluate(output_dir=tmp_path / "out", steps=1, device="cpu", **({"guidance": 1.0} | given))
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_page_stands_alone_escapes_prompts_and_describes_every_picture(comparison, tmp_path):
    write_report(comparison, tmp_path, method="dpo", base_name="base", aligned_name="new")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>dog</b>" not in page and "&lt;b&gt;dog&lt;/b&gt;" in page and "鸟" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page
    images = re.findall(r"<img [^>]*>", page)
    assert images and all('alt="' in image and 'alt=""' not in image for image in images)
    panels = re.findall(r"<h2>([^<]+)</h2><p class=\"what\">What am I looking at", page)
    assert panels == [
        *("All scores", "Appearance", "Worst regressions", "Largest changes", "Random pairs", "Largest improvements")
    ]
    data = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(data[1]))).size == (48, 32)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width >= 640
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_shown_pairs_are_those_that_changed_and_a_fair_sample(comparison):
    assert most_changed(comparison, "red", 9, better=True) == [2]
    assert most_changed(comparison, "red", 9, better=False) == [4]
    assert most_changed(comparison, "is_dark", 9, better=False) == []
    fair = random_pairs(comparison, 6)
    assert sorted(fair) == list(range(6))
    assert {index // 2 for index in fair[:3]} == {0, 1, 2}  # every prompt once before any comes again


def test_the_headline_claims_no_more_than_the_interval_allows():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    for shift, tone, words in ((0.5, "better", "improvement"), (-0.5, "worse", "loss"), (0.0, "unclear", "no clear")):
        result = compare_paired(base, base + shift + rng.normal(0, 0.3, 200), range(200))
        sentence, got = headline("score", result, False)
        assert got == tone and words in sentence
    assert headline("score", compare_paired([float("nan")], [1.0], ["a"]), False)[1] == "unclear"


def test_prompts_are_read_from_lists_files_and_built_in_sets(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two  words \none\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two words"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n"two"\n')
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["one", "two"]
    (tmp_path / "a.json").write_text('["one", {"prompt": "two"}]')
    assert read_prompts(tmp_path / "a.json", limit=1) == ["one"]
    held, seen = read_prompts("shapes:heldout", limit=50), read_prompts("shapes:seen")
    assert (len(held), len(seen)) == (50, 100)
    assert all(set(parse(text).things) & HELD_OUT for text in held)
    assert not any(set(parse(text).things) & HELD_OUT for text in seen)


@pytest.mark.parametrize(
    ("name", "text", "error", "word"),
    [
        ("a.txt", "\n \n", DataError, "no prompts"),
        ("a.jsonl", '{"text": "x"}', DataError, "line 1"),
        ("a.jsonl", '"x"\n{', DataError, "line 2"),
        ("a.json", "{}", DataError, "list"),
        ("a.pdf", "x", ConfigError, r"\.txt"),
    ],
)
def test_bad_prompt_files_name_the_place(tmp_path, name, text, error, word):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=word):
        read_prompts(tmp_path / name)


def test_repeated_prompts_seeds_or_scorers_are_refused():
    for prompts, seeds, scorers in (
        (["a", "a"], [0], SCORERS),
        (["a"], [0, 0], SCORERS),
        (["a"], [0], SCORERS[:1] * 2),
    ):
        with pytest.raises(ConfigError, match="twice"):
            compare(None, None, prompts, seeds, scorers)
