"""VQAScore on real vision-language models at toy size."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from reward_models import RewardModelError, load_reward_model

from .conftest import BLUE, RED
from .tiny_vlm import save, tiny_llava_onevision, tiny_qwen2_vl

PICTURES = [Image.new("RGB", (16 + 4 * n, 20), (30 * n, 90, 255 - 30 * n)) for n in range(4)]
PROMPTS = [f"picture {'very ' * n}red" for n in range(4)]


@pytest.mark.parametrize("build", [tiny_qwen2_vl, tiny_llava_onevision], ids=["qwen2-vl", "llava-onevision"])
def test_scores_are_probabilities_whatever_the_batch(build, tmp_path):
    model, processor = build()
    scorer = load_reward_model("vqascore", model=save(tmp_path, model, processor), device="cpu")
    scores = scorer.score(PICTURES, PROMPTS)
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(PICTURES, PROMPTS, strict=True)])
    assert torch.allclose(scores, alone, atol=1e-4)
    assert torch.equal(scores, scorer.score(PICTURES, PROMPTS))
    assert len(set(scores.tolist())) == 4
    asked = [
        {"type": "image"},
        {"type": "text", "text": f'Does this figure show "{PROMPTS[2]}"? Please answer Yes or No.'},
    ]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[PICTURES[2]], return_tensors="pt")
    with torch.no_grad():  # restated: the softmax over the vocabulary where the answer begins
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    assert float(scores[2]) == pytest.approx(float(probabilities[yes]), rel=1e-4)
    transparent = RED.convert("RGBA")
    assert torch.equal(scorer.score([transparent], ["red"]), scorer.score([RED], ["red"]))


def test_a_model_that_knows_red_scores_red(checkpoint):
    scorer = load_reward_model("vqascore", model=checkpoint, device="cpu", question="is it {prompt}")
    red, blue = scorer.score([RED, BLUE], ["red"] * 2)
    assert red > 0.9
    assert blue < 0.1
    other = load_reward_model("vqascore", model=checkpoint, device="cpu", question="is it {prompt}?").identity
    assert other["settings"] != scorer.identity["settings"] and other["revision"] == scorer.identity["revision"]
    with pytest.raises(RewardModelError, match=r"\{prompt\}"):
        load_reward_model("vqascore", model=checkpoint, question="red?")
