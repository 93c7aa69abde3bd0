"""The heavier proofs: the other classes of checkpoints, and the server that transformers itself brings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.utils.import_utils import is_serve_available

from reward_models import load_reward_model
from reward_models.unified_reward import LocalBackend
from reward_models.unified_reward.backend import Picture, Request

from .conftest import BLUE, RED
from .tiny_vlm import TEXT, save, tiny_qwen2_vl

pytestmark = pytest.mark.slow
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "out_hidden_size": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def tiny_qwen(name: str, folder: Path) -> Path:
    """Qwen2.5-VL or Qwen3-VL with the tokenizer and picture reading of the tiny Qwen2-VL."""
    small, processor = tiny_qwen2_vl()
    tokens = {
        key: value for key, value in small.config.to_dict().items() if key.endswith("_token_id") and value is not None
    }
    text = {**TEXT, "vocab_size": len(processor.tokenizer), "rope_parameters": ROPE}
    text |= {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    torch.manual_seed(0)
    if name == "qwen2.5-vl":
        vision = {**VISION, "window_size": 16, "fullatt_block_indexes": [0]}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    else:
        text |= {"head_dim": 16, "rope_parameters": ROPE | {"mrope_interleaved": True}}
        vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
        processor = Qwen3VLProcessor(
            processor.image_processor,
            processor.tokenizer,
            processor.video_processor,
            chat_template=processor.chat_template,
        )
    return save(folder, model.eval(), processor)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_other_classes_answer_alike_in_any_batch(name, tmp_path):
    backend = LocalBackend(tiny_qwen(name, tmp_path), device="cpu")
    pictures = [Picture(RED), Picture(BLUE), Picture(Image.new("RGB", (24, 16)))]
    requests = [
        Request((pictures[0], pictures[1]), "one?", max_tokens=5),
        Request((pictures[1], pictures[2]), "a longer one?", max_tokens=5),
    ]
    assert backend.answer(requests) == [backend.answer([request])[0] for request in requests]
    weights = backend.choose(requests, ("Yes", "No"))
    alone = torch.cat([backend.choose([request], ("Yes", "No")) for request in requests])
    assert torch.allclose(weights, alone, atol=1e-4)
    assert not torch.allclose(weights[0], weights[1], atol=1e-5)


@pytest.mark.skipif(not is_serve_available(), reason="needs pip install transformers[serving]")
def test_transformers_serve(checkpoint, tmp_path):
    """The same checkpoint behind ``transformers serve`` judges as it does in this process."""
    (tmp_path / "pair.txt").write_text("{prompt}?")
    options = {"family": "7b", "pair_prompt": tmp_path / "pair.txt", "max_tokens": 16}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        checkpoint,
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log.txt")
        judge = load_reward_model(
            "unified-reward", backend="server", base_url=f"http://127.0.0.1:{port}/v1", model=str(checkpoint), **options
        )
        shares = judge.compare([(RED, BLUE), (BLUE, RED)], ["red"] * 2)
        assert shares.tolist() == [1.0, 0.0], (tmp_path / "log.txt").read_text()[-2000:]
        assert judge.statistics.agreement == 1.0
        local = load_reward_model("unified-reward", model=checkpoint, device="cpu", **options)
        assert torch.equal(local.compare([(RED, BLUE), (BLUE, RED)], ["red"] * 2), shares)
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 420
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url, trust_env=False, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
