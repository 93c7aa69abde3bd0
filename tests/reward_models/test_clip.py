"""CLIPScore on a small open_clip model saved in open_clip's own format."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image

from reward_models import RewardModelError, load_reward_model

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PICTURES = [Image.linear_gradient("L").resize((40 + 7 * n, 50)).convert("RGB").rotate(30 * n) for n in range(8)]
PROMPTS = [f"picture number {n}" for n in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip-test")
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt", model.eval()


def test_scores_are_clipscores_whatever_the_batch(checkpoint):
    path, model = checkpoint
    scorer = load_reward_model("clip", model="tiny-clip-test", tag=str(path), device="cpu")
    scores = scorer.score(PICTURES, PROMPTS)
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(PICTURES, PROMPTS, strict=True)])
    assert torch.allclose(scores, alone, atol=1e-4)
    assert torch.equal(scores, scorer.score(PICTURES, PROMPTS))
    transform = open_clip.image_transform(32, is_train=False)  # restated independently, one picture at a time
    tokenizer = open_clip.get_tokenizer("tiny-clip-test")
    with torch.no_grad():
        for score, image, prompt in zip(scores, PICTURES, PROMPTS, strict=True):
            seen, told = model.encode_image(transform(image)[None])[0], model.encode_text(tokenizer([prompt]))[0]
            cosine = float(seen @ told / seen.norm() / told.norm())
            assert float(score) == pytest.approx(2.5 * max(cosine, 0.0), abs=1e-5)
    assert scores.max() > 0
    assert scorer.identity["id"] == "tiny-clip-test"


def test_an_unknown_model_is_refused():
    with pytest.raises(RewardModelError, match="no-such-model"):
        load_reward_model("clip", model="no-such-model", tag=None, device="cpu")
