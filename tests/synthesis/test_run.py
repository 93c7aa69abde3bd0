"""A run: what it writes, and the ways in which pictures are drawn and judged."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffalign.data import check_preferences, load_preferences
from diffalign.errors import ConfigError
from diffalign.synthesis.run import generate
from tests.synthesis.conftest import JUDGES, PROMPTS, table_bytes
from tests.synthesis.judges import red

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
