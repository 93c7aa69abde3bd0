"""VQAScore's own model against its parts put together one picture at a time, without padding."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from reward_models import RewardModelError, load_reward_model
from reward_models.preprocessing import CLIP_MEAN, CLIP_STD

from . import checkpoints
from .checkpoints import PROMPTS, SIZE, pictures


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, checkpoints.clip_flant5_folder(folder)


def padded(image: Image.Image) -> torch.Tensor:
    """On a square of CLIP's mean colour, to SIZE by PIL's bicubic, CLIP's mean and std."""
    pixels = np.asarray(image)
    side = max(pixels.shape[:2])
    square = np.broadcast_to(np.array([122, 116, 104], np.uint8), (side, side, 3)).copy()
    top, left = (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2
    square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    small = np.asarray(Image.fromarray(square).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255.0
    return torch.from_numpy((small - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).float().permute(2, 0, 1)


class Restated:
    """The original's forward pass over its own keys."""

    def __init__(self, folder, state) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        self.t5 = T5ForConditionalGeneration(T5Config.from_dict(config | {"model_type": "t5"})).eval()
        self.t5.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
        own = {key: value for key, value in state.items() if key.split(".")[0] in ("shared", "encoder", "decoder")}
        assert not self.t5.load_state_dict(own | {"lm_head.weight": state["lm_head.weight"]}, strict=True)[0]
        self.tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder / "vision")).eval()
        prefix = "vision_tower.vision_tower.vision_model."
        self.tower.load_state_dict({key: state[prefix + key] for key in self.tower.state_dict()})
        self.state = state

    @torch.no_grad()
    def log_probabilities(self, image: Image.Image, prompt: str) -> torch.Tensor:
        """Of "Yes" and </s>, token by token."""
        patches = self.tower(padded(image)[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        w = {key.removeprefix("mm_projector."): value for key, value in self.state.items() if "projector" in key}
        inner = patches @ w["0.weight"].T + w["0.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        seen = inner @ w["2.weight"].T + w["2.bias"]
        before = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: "
        )
        after = f'\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
        texts = [self.state["shared.weight"][self.tokenizer(text)["input_ids"]] for text in (before, after)]
        said = self.tokenizer("Yes")["input_ids"]
        logits = self.t5(
            inputs_embeds=torch.cat([texts[0], seen, texts[1]])[None], decoder_input_ids=torch.tensor([[0, *said[:-1]]])
        ).logits[0, :, : len(self.tokenizer)]
        return torch.stack([row.log_softmax(-1)[token] for row, token in zip(logits, said, strict=True)])


def test_scores_are_those_of_the_parts_put_together(original, load_scorer):
    restated, scorer = Restated(*original), load_scorer("vqascore")
    scores = scorer.score(pictures(), PROMPTS)
    for score, image, prompt in zip(scores, pictures(), PROMPTS, strict=True):
        logs = restated.log_probabilities(image, prompt)
        assert math.log(score) == pytest.approx(float(logs.mean()), abs=1e-4)
        assert abs(float(logs.mean() - logs[:-1].mean())) > 1e-3, "the answer's end counts"
    assert 0 <= scores.min() <= scores.max() <= 1


def test_a_caption_cannot_show_a_second_picture(load_scorer):
    """The original splits the text at ``<image>``, the caption's too."""
    scorer = load_scorer("vqascore")
    assert scorer.score(pictures()[:1], ["a <image> on a wall"]).isfinite().all()


def test_the_named_tower_is_taken_where_the_checkpoint_has_none(tmp_path, load_scorer):
    checkpoints.clip_flant5_folder(tmp_path, tower=False)
    plain = load_reward_model("vqascore", model=tmp_path, device="cpu")
    tuned = load_scorer("vqascore")
    assert plain.identity["revision"] != tuned.identity["revision"]
    assert not torch.allclose(plain.score(pictures(), PROMPTS), tuned.score(pictures(), PROMPTS), atol=1e-4)
    named = CLIPVisionModel.from_pretrained(tmp_path / "vision")
    assert torch.equal(plain.backend.tower.pre_layrnorm.weight, named.pre_layrnorm.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mm_projector.2.bias"), "missing keys 2.bias"),
        (lambda state: state.pop("mm_projector.0.weight"), "lacks mm_projector"),
        (lambda state: state.pop("decoder.block.1.layer.2.layer_norm.weight"), "missing keys decoder.block.1"),
        (lambda state: state.pop("vision_tower.vision_tower.vision_model.pre_layrnorm.bias"), "missing keys pre_lay"),
        (lambda state: state.update({"other.weight": torch.zeros(1)}), "unexpected keys other.weight"),
    ],
)
def test_other_keys_are_refused(change, message, tmp_path):
    state = dict(checkpoints.clip_flant5_folder(tmp_path))
    change(state)
    for file in tmp_path.glob("pytorch_model*"):
        file.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")  # in one file, as smaller checkpoints come
    with pytest.raises(RewardModelError, match=message):
        load_reward_model("vqascore", model=tmp_path, device="cpu")


def test_options_of_the_other_kind_of_model_are_refused(scorer_options, tmp_path):
    with pytest.raises(RewardModelError, match="template_options"):
        load_reward_model("vqascore", **scorer_options("vqascore"), template_options={"a": 1})
    with pytest.raises(RewardModelError, match="no CLIP-FlanT5"):
        load_reward_model("vqascore", model=tmp_path, tokenizer=tmp_path)
