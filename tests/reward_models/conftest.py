"""Every scorer on a small checkpoint of its own format, loaded once."""

from __future__ import annotations

import functools

import pytest
import torch

from reward_models import load_reward_model

from . import checkpoints

SCORERS = ("aesthetic", "aesthetic-v1", "clip", "hpsv2", "hpsv3", "imagereward", "mps", "pickscore", "vqascore")


@pytest.fixture(scope="session")
def scorer_options(tmp_path_factory):
    """``scorer_options(name)``: what loads the small checkpoint of ``name``, on the CPU."""

    @functools.cache
    def options(name: str) -> dict:
        folder = tmp_path_factory.mktemp(name)
        common = {"device": "cpu"}
        if name in ("aesthetic", "aesthetic-v1"):
            checkpoints.clip_folder(folder)
            write = checkpoints.aesthetic_v1_file if name.endswith("v1") else checkpoints.aesthetic_v2_file
            write(folder / "head.pth")
            return common | {
                "version": "v1" if name.endswith("v1") else "v2",
                "head": folder / "head.pth",
                "clip": folder,
            }
        if name == "clip":
            model = checkpoints.open_clip_model(folder, seed=2, name="tiny-clip-test")
            torch.save(model.state_dict(), folder / "weights.pt")
            return common | {"model": "tiny-clip-test", "tag": str(folder / "weights.pt")}
        if name == "hpsv2":
            checkpoints.hps_file(folder / "HPS_v2.1_compressed.pt", seed=1)
            return common | {"checkpoint": folder, "architecture": "tiny-scorer-test"}
        if name == "hpsv3":
            checkpoints.hpsv3_file(folder, old_keys=True)
            small = {"pixels": 4 * 28 * 28, "dtype": torch.float32, "batch_size": 16}
            return common | small | {"checkpoint": folder, "backbone": folder, "instruction": checkpoints.INSTRUCTION}
        if name == "imagereward":
            checkpoints.bert_folder(folder)
            checkpoints.imagereward_file(folder)
            return common | {"checkpoint": folder, "tokenizer": folder}
        if name == "mps":
            checkpoints.mps_file(folder)
            return common | {"checkpoint": folder, "backbone": folder}
        if name == "vqascore":
            checkpoints.clip_flant5_folder(folder)
            return common | {"model": folder}
        checkpoints.clip_folder(folder)
        return common | {"checkpoint": folder}

    return options


@pytest.fixture(scope="session")
def load_scorer(scorer_options):
    """``load_scorer(name, **changes)``: the scorer; loaded once when nothing is changed."""

    @functools.cache
    def unchanged(name: str):
        return load_reward_model(name.removesuffix("-v1"), **scorer_options(name))

    def load(name: str, **changes):
        if not changes:
            return unchanged(name)
        return load_reward_model(name.removesuffix("-v1"), **{**scorer_options(name), **changes})

    return load
