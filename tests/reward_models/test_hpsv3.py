"""HPSv3 against its parts put together one picture at a time, without padding."""

from __future__ import annotations

import sys

import pytest
import torch

from reward_models import RewardModelError, load_reward_model
from reward_models.hpsv3 import PIXELS, _from_package

from . import checkpoints
from .checkpoints import INSTRUCTION, PROMPTS, pictures


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model, head = checkpoints.hpsv3_file(folder, old_keys=False)
    return folder, model.eval(), head.eval()


@torch.no_grad()
def alone(scorer, model, head, image, prompt, positions="sequence"):
    """The two numbers of the head for one picture."""
    small = scorer._resized(image)
    vision = scorer.processor.image_processor(small, do_resize=False, return_tensors="pt")
    tokens = small.width * small.height // 28**2
    text = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>"
        + INSTRUCTION.format(text_prompt=prompt) + "<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    ids = scorer.processor.tokenizer(text, return_tensors="pt").input_ids
    embedded = model.language_model.embed_tokens(ids)
    is_picture = ids == scorer.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    embedded[is_picture] = model.visual(vision["pixel_values"], grid_thw=vision["image_grid_thw"]).pooler_output
    places = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if positions == "grid":
        places = model.get_rope_index(ids, is_picture.int(), image_grid_thw=vision["image_grid_thw"])[0]
    hidden = model.language_model(inputs_embeds=embedded, position_ids=places, use_cache=False).last_hidden_state
    weights = [(head[n].weight, head[n].bias) for n in (0, 3, 5)]
    x = hidden[ids == scorer.reward_id][0]
    for n, (weight, bias) in enumerate(weights):
        x = weight @ x + bias
        x = x.clamp(min=0) if n < 2 else x
    return x


def test_scores_are_those_of_the_parts_put_together(load_scorer, original):
    scorer, images, (_, model, head) = load_scorer("hpsv3"), pictures(), original
    scores = scorer.score(images, PROMPTS)
    for n, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        mean, other = alone(scorer, model, head, image, prompt)
        assert float(scores[n]) == pytest.approx(float(mean), abs=1e-4)
        assert abs(float(mean - other)) > 1e-2
        grid = alone(scorer, model, head, image, prompt, "grid")[0]
        assert abs(float(mean - grid)) > 1e-4, "positions on the picture's grid are another score"


def test_both_generations_of_keys_are_one_model(load_scorer, original):
    new = load_scorer("hpsv3", checkpoint=original[0])
    assert new.identity["revision"] == load_scorer("hpsv3").identity["revision"]
    assert torch.equal(new.score(pictures(), PROMPTS), load_scorer("hpsv3").score(pictures(), PROMPTS))


def test_pictures_keep_their_shape_at_about_the_trained_size(load_scorer):
    scorer = load_scorer("hpsv3")
    for width, height in [(1024, 1024), (512, 512), (1216, 832), (333, 777), (60, 50)]:
        image = checkpoints.pictures()[0].resize((width, height))
        scorer_pixels, scorer.pixels = scorer.pixels, PIXELS
        try:
            small = scorer._resized(image)
        finally:
            scorer.pixels = scorer_pixels
        assert (small.width % 28, small.height % 28) == (0, 0)
        assert 0.85 * PIXELS < small.width * small.height < 1.2 * PIXELS
        assert small.width / small.height == pytest.approx(width / height, rel=0.1)
    with pytest.raises(RewardModelError, match="aspect ratio"):
        scorer._resized(checkpoints.pictures()[0].resize((600, 2)))


def test_a_prompt_that_spells_special_tokens_is_not_judged(load_scorer):
    prompts = ["fine", "a <|Reward|>", "an <|image_pad|>", "fine"]
    scores = load_scorer("hpsv3").score(pictures()[:4], prompts)
    assert scores.isnan().tolist() == [False, True, True, False]
    assert load_scorer("hpsv3").score(pictures()[:1], ["<|im_end|>"]).isnan().all()


def test_the_instruction_comes_from_a_file_or_the_makers_package_unimported(
    load_scorer, scorer_options, tmp_path, monkeypatch
):
    with pytest.raises(RewardModelError, match="pip install --no-deps hpsv3"):
        load_reward_model("hpsv3", **scorer_options("hpsv3") | {"instruction": None})
    (tmp_path / "text.txt").write_text(INSTRUCTION)
    from_file = load_scorer("hpsv3", instruction=tmp_path / "text.txt")
    assert from_file.identity["settings"] == load_scorer("hpsv3").identity["settings"]
    package = tmp_path / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    head, _, tail = INSTRUCTION.partition("Rating")
    source = f"import nothing_installed\nINSTRUCTION = {head!r}\nprompt_with_special_token = {'Rating' + tail!r}\n"
    (package / "data_collator_qwen.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert _from_package() == INSTRUCTION
    assert "hpsv3" not in sys.modules
    for bad in ("no place for it <|Reward|> {prompt}", "{text_prompt}", "{text_prompt} <|Reward|> <|Reward|>"):
        with pytest.raises(RewardModelError, match="instruction"):
            load_reward_model("hpsv3", **scorer_options("hpsv3") | {"instruction": bad})


def test_other_keys_are_refused(original, scorer_options, tmp_path):
    from safetensors.torch import load_file, save_file

    for key, message in [
        ("rm_head.5.bias", "missing keys 5.bias"),
        ("rm_head.0.weight", "lacks rm_head"),
        ("model.language_model.embed_tokens.weight", "embed_tokens"),
        ("model.language_model.layers.1.mlp.up_proj.weight", "missing keys .*up_proj"),
    ]:
        state = load_file(original[0] / "HPSv3.safetensors")
        del state[key]
        save_file(state, tmp_path / "HPSv3.safetensors")
        with pytest.raises(RewardModelError, match=message):
            load_reward_model("hpsv3", **scorer_options("hpsv3") | {"checkpoint": tmp_path})
