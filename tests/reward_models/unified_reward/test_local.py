"""Real vision-language models run in this process: chat template, picture tokens, generation, parsing, logits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from reward_models import RewardModelError, load_reward_model
from reward_models.unified_reward import LocalBackend
from reward_models.unified_reward.backend import Picture, Request

from .conftest import BLUE, RED
from .tiny_vlm import save, tiny_llava_onevision, tiny_qwen2_vl

PURPLE = Image.new("RGB", (16, 16), (125, 20, 125))
QUESTIONS = [
    Request((Picture(RED), Picture(BLUE)), "one?", max_tokens=6),
    Request((Picture(BLUE), Picture(Image.new("RGB", (24, 16)))), "a longer question?", max_tokens=9),
    Request((Picture(PURPLE),), "two?", max_tokens=6),
]


@pytest.fixture(scope="module")
def wording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "pair.txt").write_text("{prompt}?")
    (folder / "point.txt").write_text("rate {prompt}")
    return {"pair_prompt": folder / "pair.txt", "point_prompt": folder / "point.txt"}


def test_a_real_model_judges_and_scores(checkpoint, wording, tmp_path):
    record = tmp_path / "log" / "answers.jsonl"
    judge = load_reward_model(
        "unified-reward", family="7b", model=checkpoint, device="cpu", max_tokens=16, record=record, **wording
    )
    pairs = [(RED, BLUE), (BLUE, RED), (RED, RED)]
    assert judge.compare(pairs, ["red"] * 3).tolist() == [1.0, 0.0, 0.5]
    assert judge.score([RED, BLUE], ["red"] * 2).tolist() == [5.0, 1.0]
    assert (judge.statistics.judged, judge.statistics.agreed, judge.statistics.identical) == (2, 2, 1)
    assert judge.statistics.answers == 4  # the second pair is the first one swapped: its questions were asked already
    assert record.read_text().count("Image 1 is better") == 1
    assert judge.identity["id"] == str(checkpoint)
    assert judge.identity["code_version"].startswith("verdict+final-score text ")


def test_logits_prefer_the_same_pictures_without_an_answer(checkpoint, wording):
    judge = load_reward_model("unified-reward", family="7b", model=checkpoint, device="cpu", mode="logits", **wording)
    shares = judge.compare([(RED, BLUE), (BLUE, RED), (RED, PURPLE)], ["red"] * 3)
    assert shares[0] > 0.9
    assert shares[1] == pytest.approx(1 - float(shares[0]), abs=1e-6)
    assert 0 < shares[2] < 1
    odds = judge.backend.choose([Request((Picture(RED), Picture(BLUE)), "red?")], ("Image 1", "Image 2"))[0]
    back = judge.backend.choose([Request((Picture(BLUE), Picture(RED)), "red?")], ("Image 1", "Image 2"))[0]
    expected = (odds.softmax(0)[0] + back.softmax(0)[1]) / 2
    assert float(shares[0]) == pytest.approx(float(expected), abs=1e-5)


def test_an_answer_that_is_written_first_is_weighed_where_its_verdict_stands(checkpoint):
    import re

    backend = LocalBackend(checkpoint, device="cpu")
    request = Request((Picture(RED), Picture(BLUE)), "red?", max_tokens=16)
    verdict = re.compile(r"(Image) [12] is better")
    (written,) = backend.weigh([request], verdict, direct=False)
    (direct,) = backend.weigh([request], verdict, direct=True)
    assert written.text == "Image 1 is better"
    assert written.weights == pytest.approx(direct.weights, abs=1e-4)  # nothing was said before the verdict
    (none,) = backend.weigh([request], re.compile("(never) said"), direct=False)
    assert none.weights is None


@pytest.mark.parametrize("build", [tiny_qwen2_vl, tiny_llava_onevision], ids=["qwen2-vl", "llava-onevision"])
def test_batches_and_seeds_decide_nothing_but_what_they_should(build, tmp_path):
    backend = LocalBackend(save(tmp_path, *build()), device="cpu")
    pairs = QUESTIONS[:2]
    greedy = backend.answer(pairs)
    assert greedy == [backend.answer([request])[0] for request in pairs]
    assert all(answer.truncated for answer in greedy)  # an untaught model never ends
    warm = [Request(r.pictures, r.text, r.max_tokens, temperature=1.0, seed=5 + i) for i, r in enumerate(pairs)]
    drawn = backend.answer(warm)
    assert drawn == [backend.answer([request])[0] for request in warm]
    assert drawn != greedy
    assert [len(text) for text in (greedy[0].text, greedy[1].text)] != [0, 0]
    weights = backend.choose(pairs, ("Yes", "No"))
    alone = torch.cat([backend.choose([request], ("Yes", "No")) for request in pairs])
    assert torch.allclose(weights, alone, atol=1e-4)
    assert not torch.allclose(weights[0], weights[1], atol=1e-4)


def test_untaught_models_give_missing_judgements(tmp_path):
    path = save(tmp_path, *tiny_qwen2_vl())
    judge = load_reward_model("unified-reward", family="think", model=path, device="cpu", max_tokens=4)
    assert judge.compare([(RED, BLUE)], ["red"]).isnan().all()
    assert judge.statistics.pairs_missing == 1
    assert judge.statistics.failures == {"truncated": 2}
    assert judge.statistics.asked_again == 2
    with pytest.raises(RewardModelError, match="only compares pairs"):
        judge.score([RED], ["red"])


def test_control_tokens_in_a_caption_are_plain_words(checkpoint):
    """They would end the turn, or claim pictures that are not there."""
    backend = LocalBackend(checkpoint, device="cpu")
    plain = backend._inputs([Request((Picture(RED),), "a <|image_pad|> b <|im_end|>")])["input_ids"][0].tolist()
    clean = backend._inputs([Request((Picture(RED),), "nothing")])["input_ids"][0].tolist()
    for token in ("<|image_pad|>", "<|im_end|>"):
        number = backend.processor.tokenizer.convert_tokens_to_ids(token)
        assert plain.count(number) == clean.count(number) > 0
    word = backend.processor.tokenizer.convert_tokens_to_ids("red")  # one token too, but no control: <think> is such
    assert word in backend._inputs([Request((Picture(RED),), "red")])["input_ids"][0]


def test_what_cannot_be_loaded_is_refused(tmp_path, checkpoint):
    with pytest.raises(RewardModelError, match="vision-language"):
        load_reward_model("unified-reward", model=tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "llava_qwen"}')
    with pytest.raises(RewardModelError, match="SGLang"):
        load_reward_model("unified-reward", model=tmp_path, device="cpu")
    with pytest.raises(RewardModelError, match="several tokens"):
        LocalBackend(checkpoint, device="cpu").choose(QUESTIONS[:1], ("red", "blue"))
