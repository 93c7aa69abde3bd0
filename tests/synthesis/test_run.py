"""A run: what it writes, that nothing interrupts it for good, and that bad input costs nothing."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.data import check_preferences, load_preferences, store_score_ranges
from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.artists import Artist
from diffalign.synthesis.config import GenerationConfig, dump
from diffalign.synthesis.run import generate
from tests import children
from tests.synthesis.conftest import JUDGES, PROMPTS, child, table_bytes
from tests.synthesis.judges import red

ROOT = Path(__file__).parents[2]


def kill_at(write: int, how: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Makes a process kill (or stop) itself in the middle of writing its n-th file."""
    return partial(_kill_at, write, how)


def _kill_at(write: int, how: signal.Signals) -> None:
    fsync, count = os.fsync, iter(range(1, 10**6))

    def counting(descriptor):
        if next(count) == write:
            os.kill(os.getpid(), how)
        fsync(descriptor)

    os.fsync = counting


def on_a_full_disk(config: GenerationConfig, said: Path) -> None:
    """Runs the generator and notes its error. A limit on file size stands for the full disk: the write itself fails."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - what is captured of the parent's output is a file too
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    try:
        generate(config)
    except DataError as error:
        said.write_text(str(error))


# --- what it writes ----------------------------------------------------------------------------------------------


def test_a_run_gives_a_ranked_table_with_everything_in_it(clean):
    config, report = clean
    rows = datasets.load_dataset(config.output_dir, split="train")
    assert rows["prompt"][:] == PROMPTS
    assert check_preferences(config.output_dir).ok
    for row in rows:
        scores = {entry["name"]: entry["values"] for entry in row["scores"]}
        assert scores["red"] == pytest.approx(red(row["images"], []))
        assert [source["pipeline"] for source in row["sources"]] == ["one", "one", "two"]
        votes = [sum(scores[name][i] > other for name in scores for other in scores[name]) / 4 for i in range(3)]
        assert row["preference"] == pytest.approx(votes)
        assert row["rank"][int(np.argmax(votes))] == 1
    assert (report["rows"], report["images"], report["drawn"]) == (5, 15, 15)
    assert report["by_pipeline"]["one"]["diversity"] > 0 and report["diversity"] > 0
    assert report["by_pipeline"]["two"]["diversity"] is None  # one picture a prompt
    manifest = json.loads((Path(config.output_dir) / "manifest.json").read_text())
    assert sum(known["rows"] for known in manifest["files"].values()) == 5


def test_a_stored_seed_draws_the_stored_picture_again(clean, painters):
    import torch

    row = datasets.load_dataset(clean[0].output_dir, split="train")[3]
    source = row["sources"][1]
    assert source["model"] == "painter0"  # no folder of this machine
    pipeline = StableDiffusionPipeline.from_pretrained(painters[0])
    generator = torch.Generator("cpu").manual_seed(source["seed"])
    again = pipeline(row["prompt"], generator=generator, num_inference_steps=1, guidance_scale=2.0).images[0]
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(row["images"][1], dtype=int)).max() <= 1


def test_no_folder_of_this_machine_is_published(clean, painters):
    folder = Path(clean[0].output_dir)
    written = [folder / name for name in ("manifest.json", "generation_report.json", "README.md")]
    tables = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    text = "".join(file.read_text() for file in written) + repr(tables)
    assert '"model": "painter0"' in text and "'model': 'painter1'" in text
    assert not any(str(Path(painter).parent) in text for painter in painters)
    assert painters[0] in (folder / "settings.json").read_text()  # never uploaded; it tells runs apart


def test_the_card_has_a_header_that_the_hub_reads(clean):
    from huggingface_hub import DatasetCard

    config, _ = clean
    card = DatasetCard.load(Path(config.output_dir) / "README.md")
    assert card.data.task_categories == ["text-to-image"] and card.data.size_categories == ["n<1K"]
    assert "painter0" in card.text and str(Path(config.output_dir).parent) not in card.text
    with Image.open(Path(config.output_dir) / "grid.png") as grid:
        assert grid.height > 5 * 160


def test_a_licence_that_is_not_known_is_not_claimed(settings, painters):
    spec = {"model": painters[0], "steps": 1, "guidance": 1.0}
    pipelines = [{"name": "a", "license": "mit", **spec}, {"name": "b", **spec}]
    judges = [{"name": "red", "model": JUDGES + "red"}, {"name": "s", "model": JUDGES + "spread", "license": "cc0-1.0"}]
    config = settings(pipelines=pipelines, reward_models=judges, prompts_per_shard=9)
    report = generate(config)
    text = (Path(config.output_dir) / "README.md").read_text()
    assert "license: other" in text and "mit, unknown" in text
    assert {name: own["license"] for name, own in report["reward_models"].items()} == {"red": None, "s": "cc0-1.0"}
    assert re.search(r"\| red \|[^|]*\| unknown \|", text) and re.search(r"\| s \|[^|]*\| cc0-1.0 \|", text)
    named = config.model_copy(
        update={"reward_models": [spec.model_copy(update={"license": "mit"}) for spec in config.reward_models]}
    )
    assert generate(named)["reward_models"]["red"]["license"] == "mit"  # a licence is no reason to begin anew


def test_one_model_at_a_time_gives_the_same_bytes(clean, settings):
    config = settings("staged", load_models="one_by_one")
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


def test_a_finished_run_started_again_does_nothing(own_clean, monkeypatch):
    before = table_bytes(own_clean.output_dir)
    monkeypatch.setattr("diffalign.synthesis.run.Artist", None)
    monkeypatch.setattr("diffalign.synthesis.run.Scorer", None)
    assert generate(own_clean)["rows"] == 5
    assert table_bytes(own_clean.output_dir) == before


# --- interruptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "writes"), [("together", (2, 5, 6)), ("one_by_one", (3, 8))])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(clean, settings, mode, writes):
    config = settings("killed", load_models=mode)
    for write in writes:
        assert children.wait(child(config, kill_at(write))) == -signal.SIGKILL
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)
    assert not list(Path(config.output_dir).rglob("*.tmp"))


def test_what_a_pipeline_drew_is_kept_while_the_next_one_draws(settings, monkeypatch):
    config, draw, kept = settings("kept"), Artist.draw, []

    def watched(self, prompts, seed):
        if self.name == "two":
            file = Path(config.output_dir) / ".work" / "drawn" / "one" / f"{len(kept):05d}.parquet"
            deadline = time.monotonic() + 300
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            kept.append(file.exists())
        return draw(self, prompts, seed)

    monkeypatch.setattr(Artist, "draw", watched)
    generate(config)
    assert kept == [True] * 3


@pytest.mark.slow
def test_twenty_kills_at_random_times(clean, settings):
    config, rng = settings("killed"), random.Random(7)
    killed = 0
    while killed < 20:
        process = child(config)
        process.join(rng.uniform(0.02, 0.6))
        if process.exitcode is None:
            process.kill()
            process.join()
        killed += 1
        if killed % 5 == 0:  # now and then it gets a little further
            children.wait(child(config, kill_at(5)))
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


def test_two_processes_give_what_one_gives(clean, settings):
    config = settings("shared")
    second = child(config, process=1, processes=2)
    first = child(config, process=0, processes=2)
    assert [children.wait(process) for process in (first, second)] == [0, 0]
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


@pytest.mark.slow
def test_two_launched_processes_give_what_one_gives(clean, settings, tmp_path):
    config = settings("launched")
    (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "diffalign.cli", "generate", str(tmp_path / "run.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


def test_process_0_reports_no_damaged_shard_of_another(own_clean, monkeypatch):
    shard = Path(own_clean.output_dir) / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    monkeypatch.setattr("diffalign.synthesis.run._STALL", 0.0)
    with pytest.raises(DataError, match=r"shards \[1\] are not finished, and processes \[1\] are not running"):
        generate(own_clean, process=0, processes=2)


def test_two_runs_in_one_folder_are_refused(settings):
    config = settings("shared")
    process = child(config, kill_at(4, signal.SIGSTOP))
    children.wait_until_stopped(process)
    try:
        with pytest.raises(ConfigError, match=rf"another run .*process {process.pid}"):
            generate(config)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert children.wait(process) == 0
    assert generate(config)["rows"] == 5


def test_processes_that_share_the_work_differently_are_refused(settings):
    """Process 1 of 2 holds a lock of its own, yet the run of one process would draw what it draws."""
    config = settings("mixed")
    alone = child(config, kill_at(4, signal.SIGSTOP))
    children.wait_until_stopped(alone)
    try:
        with pytest.raises(ConfigError, match=rf"another run .*process {alone.pid}.*0 of 1.*this is 1 of 2"):
            generate(config, process=1, processes=2)
    finally:
        os.kill(alone.pid, signal.SIGCONT)
    assert children.wait(alone) == 0
    assert generate(config, process=1, processes=2) is None  # it is gone, and left nothing to do


def test_other_settings_in_the_same_folder_are_refused(clean):
    with pytest.raises(ConfigError, match="seed: 0 there, 1 here"):
        generate(clean[0].model_copy(update={"seed": 1}))


def test_other_weights_under_the_same_name_are_refused(own_clean, painters, tmp_path):
    """A policy trained anew between two starts would be half of the table."""
    shutil.copytree(painters[0], tmp_path / "painter")
    one = own_clean.pipelines[0].model_copy(update={"model": str(tmp_path / "painter")})
    config = own_clean.model_copy(update={"pipelines": [one], "output_dir": str(tmp_path / "run")})
    generate(config)
    weights = tmp_path / "painter" / "unet" / "diffusion_pytorch_model.safetensors"
    changed = {name: tensor + 1e-3 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="other settings .weights.one: "):
        generate(config)


def test_finishing_a_large_table_does_not_copy_it_into_a_cache(own_clean, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    (Path(own_clean.output_dir) / "score_ranges.json").unlink()
    generate(own_clean)
    ranges = json.loads((Path(own_clean.output_dir) / "score_ranges.json").read_text())
    monkeypatch.undo()
    assert ranges == {name: list(limits) for name, limits in store_score_ranges(own_clean.output_dir).items()}


def test_a_shard_cut_in_half_is_made_again(own_clean):
    folder = Path(own_clean.output_dir)
    before = table_bytes(folder)
    shard = folder / "train-00001.parquet"
    half = shard.read_bytes()[: shard.stat().st_size // 2]
    shard.write_bytes(half)
    generate(own_clean)
    assert table_bytes(folder) == before
    assert (folder / ".work" / "damaged" / "train-00001.parquet").read_bytes() == half


def test_a_full_disk_is_one_error_and_loses_nothing(clean, settings, tmp_path):
    config = settings("full")
    assert children.wait(child(config, kill_at(6))) == -signal.SIGKILL
    kept = table_bytes(config.output_dir)
    said = tmp_path / "said.txt"
    assert children.wait(children.start(on_a_full_disk, config, said)) == 0
    assert re.search(r"cannot write .*Free space", said.read_text())
    assert kept.items() <= table_bytes(config.output_dir).items()
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


# --- bad pictures and bad scores ---------------------------------------------------------------------------------


def test_a_pipeline_that_fails_on_some_prompts_costs_those_alone(clean, settings, monkeypatch):
    original = StableDiffusionPipeline.encode_prompt

    def picky(self, prompt=None, *arguments, **options):
        if prompt is not None and any("dog" in text for text in prompt):
            raise ValueError("I draw no dogs")
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", picky)
    config = settings("picky")
    report = generate(config)
    assert [row.prompt for row in load_preferences(config.output_dir)] == ["a cat", "a bird", "a red fish"]
    assert report["set_aside"] == {"0 usable pictures of 3": 2}
    assert report["problems"] == {"one: drawing failed": 4, "two: drawing failed": 2}
    aside = [
        row for file in sorted(Path(config.output_dir).glob("set_aside/*")) for row in pq.read_table(file).to_pylist()
    ]
    assert {row["prompt"] for row in aside} == {"a dog", "two dogs"}
    assert aside[0]["problems"] == ["drawing failed: I draw no dogs"] * 3
    by_prompt = {row["prompt"]: row for row in datasets.load_dataset(clean[0].output_dir, split="train")}
    for row in datasets.load_dataset(config.output_dir, split="train"):
        for ours, theirs in zip(row["images"], by_prompt[row["prompt"]]["images"], strict=True):
            assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_a_bad_prompt_alone_in_its_shard_does_not_stop_the_run(settings, monkeypatch):
    original = StableDiffusionPipeline.encode_prompt

    def picky(self, prompt=None, *arguments, **options):
        if prompt is not None and any("fish" in text for text in prompt):
            raise ValueError("I draw no fish")
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", picky)
    report = generate(settings("lonely"))  # the last shard holds the fish alone
    assert (report["rows"], report["problems"]) == (4, {"one: drawing failed": 2, "two: drawing failed": 1})


def test_a_pipeline_that_breaks_on_the_way_spoils_no_picture(settings, painters, monkeypatch):
    """What a dead device could not draw is drawn by the next start, not recorded as failed for good."""
    original, state = StableDiffusionPipeline.encode_prompt, {"dead": False}

    def dying(self, prompt=None, *arguments, **options):
        state["dead"] |= any("dog" in text for text in prompt or [])
        if state["dead"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", dying)
    spec = {"steps": 1, "guidance": 2.0, "images": 2, "batch_size": 2}
    config = settings("dying", pipelines=[{"name": n, "model": m, **spec} for n, m in zip("ab", painters, strict=True)])
    with pytest.raises(DataError, match="illegal memory access.*run again"):
        generate(config)
    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", original)
    report = generate(config)
    assert (report["rows"], report["problems"]) == (5, {})


def test_a_pipeline_that_fails_on_everything_stops_the_run(settings, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("out of order")

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", broken)
    with pytest.raises(DataError, match="pipeline one draws nothing any more.*out of order"):
        generate(settings())


def test_missing_scores_follow_the_rule_and_nothing_is_lost(settings):
    models = [{"name": "red", "model": JUDGES + "red"}, {"name": "blind", "model": JUDGES + "blind_to_dogs"}]
    config = settings("rows", reward_models=models, missing="skip_row")
    report = generate(config)
    assert report["set_aside"] == {"missing scores of blind (rule skip_row)": 2}
    assert report["reward_models"]["blind"]["missing"] == 6
    kept = generate(settings("models", reward_models=models))
    assert kept["rows"] == 5
    aside = datasets.load_dataset("parquet", data_files=f"{config.output_dir}/set_aside/*.parquet", split="train")
    assert len(aside[0]["images"]) == 3 and aside[0]["reason"].startswith("missing")


def test_a_scorer_that_never_answers_is_said_so(settings):
    config = settings(reward_models=[{"name": "blind", "model": JUDGES + "blind"}])
    with pytest.raises(DataError, match="no prompt could be ranked.*kept in set_aside"):
        generate(config)
    assert len(list(Path(config.output_dir).glob("set_aside/*.parquet"))) == 3


def test_repeated_and_even_pictures_are_marked_not_ranked(settings, painters):
    spec = {"model": painters[0], "steps": 1, "guidance": 2.0}
    config = settings(pipelines=[{"name": "a", **spec, "images": 3}], duplicate_distance=255.0)
    with pytest.raises(DataError, match="5 1 usable pictures of 3"):
        generate(config)
    (first, *_) = pq.read_table(Path(config.output_dir) / "set_aside" / "00000.parquet").to_pylist()
    assert first["problems"] == ["", "duplicate of candidate 0", "duplicate of candidate 0"]


@pytest.mark.parametrize(("judge", "word"), [("Miscounting", "expected 3 numbers.*got 2"), ("Sure", "from 0 to 1")])
def test_a_scorer_that_answers_nonsense_invents_no_scores(settings, judge, word):
    spec = {"name": "odd", "model": JUDGES + judge}
    with pytest.raises(DataError, match=rf"odd: .*{word}"):
        generate(settings(reward_models=[spec], prompts_per_shard=1))


def test_a_reward_model_that_cannot_be_loaded_is_found_before_anything_is_drawn(settings, monkeypatch):
    monkeypatch.setattr("diffalign.synthesis.run.Artist", None)  # would be called
    with pytest.raises(ConfigError, match="mps: its weights are published only as a pickled module"):
        generate(settings(reward_models=["mps"], load_models="one_by_one"))


# --- ways of drawing and judging ---------------------------------------------------------------------------------


def test_a_judge_of_pairs_votes_by_its_comparisons(settings):
    config = settings(reward_models=[{"name": "green", "model": JUDGES + "GreenJudge"}], image_format="webp")
    generate(config)
    for row in datasets.load_dataset(config.output_dir, split="train"):
        green = [np.asarray(image)[..., 1].mean() for image in row["images"]]
        assert row["rank"] == [1 + sum(other > own for other in green) for own in green]
        (judged,) = row["comparisons"]
        assert judged["values"] == pytest.approx(
            [0.9 if green[i] > green[j] else 0.2 for i, j in ((0, 1), (0, 2), (1, 2))]
        )
    assert (
        pq.read_table(Path(config.output_dir) / "train-00000.parquet")["images"][0][0]["bytes"].as_py()[8:12] == b"WEBP"
    )


@pytest.mark.parametrize("options", [{"ask": "pairs"}, {}])
def test_a_judge_of_both_kinds_is_asked_for_pairs_when_told(settings, options):
    config = settings(reward_models=[{"name": "both", "model": JUDGES + "BothJudge", **options}])
    generate(config)
    row = next(iter(load_preferences(config.output_dir)))
    red = [np.asarray(image)[..., 0].mean() for image in row.images]
    green = [np.asarray(image)[..., 1].mean() for image in row.images]
    wanted = green if options else red
    assert row.rank == [1 + sum(other > own for other in wanted) for own in wanted]


def test_diversity_is_the_mean_distance_of_embeddings_when_asked(settings):
    spec = {"name": "eye", "model": JUDGES + "Eye"}
    config = settings(reward_models=[spec], diversity="eye")
    report = generate(config)
    shares = []
    for row in load_preferences(config.output_dir):
        seen = [np.asarray(image, dtype=float).mean((0, 1)) for image in row.images]
        seen = [vector / np.linalg.norm(vector) for vector in seen]
        shares += [1 - a @ b for i, a in enumerate(seen) for b in seen[:i]]
    assert report["diversity"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert "cosine distance of the eye embeddings" in (Path(config.output_dir) / "README.md").read_text()
    with pytest.raises(ConfigError, match="red has no `embed`"):
        generate(settings("no", diversity="red"))


def test_a_style_set_is_ranked_by_its_pipelines(settings, painters):
    spec = {"model": painters[0], "steps": 1, "guidance": 2.0}
    pipelines = [
        {"name": "plain", "weight": 0.0, **spec},
        {"name": "styled", "prompt": "an etching of {prompt}", "scheduler": "DDIMScheduler", **spec},
    ]
    config = settings(pipelines=pipelines, rank_by="pipelines", reward_models=[], image_format="jpeg")
    generate(config)
    rows = list(load_preferences(config.output_dir))
    assert [row.prompt for row in rows] == PROMPTS
    assert all(row.rank == [2, 1] and row.preference == [0.0, 1.0] for row in rows)
    assert rows[0].sources[1]["scheduler"] == "DDIMScheduler"
    assert Image.open(io.BytesIO(rows[0].image_bytes[0])).format == "JPEG"


def test_lora_pipelines_and_the_policy_of_a_run(settings, painters, tmp_path):
    from diffalign.pipelines import load_pipeline
    from diffalign.synthesis.policy import with_policy
    from diffalign.trainers import DPOConfig, DPOTrainer
    from tests.trainers.conftest import preference_rows

    run = tmp_path / "dpo"
    options = {"max_steps": 2, "batch_size": 2, "learning_rate": 0.05, "progress_bar": False}
    DPOTrainer(
        load_pipeline(painters[0]), DPOConfig(output_dir=str(run), **options), train_dataset=preference_rows()
    ).train()
    (run / "config.yaml").write_text(f"model: {painters[0]}\n")
    one = {"name": "base", "model": painters[0], "images": 2, "steps": 1, "guidance": 2.0}
    config = with_policy(settings(pipelines=[one]), run)
    assert (config.pipelines[1].model, config.pipelines[1].images) == (painters[0], 2)
    report = generate(config)
    assert set(report["by_pipeline"]) == {"base", "policy"}
    assert report["pipelines"]["policy"]["model"] == "painter0 + dpo"
    assert report["by_pipeline"]["base"]["mean_scores"] != report["by_pipeline"]["policy"]["mean_scores"]
    with pytest.raises(ConfigError, match="named 'policy' already"):
        with_policy(config, run)
    pinned = settings(pipelines=[one | {"model": "some/other", "revision": "v9", "variant": "fp16"}])
    policy = with_policy(pinned, run).pipelines[1]
    assert (policy.model, policy.revision, policy.variant) == (painters[0], None, None)  # another model's mean nothing
