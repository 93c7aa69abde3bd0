"""Guidance against a negative model in diffusers' own pipelines, checked against two passes made by hand."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.demo.models import ModelPool, parse_model
from diffalign.errors import CheckpointError, ConfigError
from diffalign.evaluation.lora import lora_loaded
from diffalign.evaluation.models import parse_models, switched_on
from diffalign.guidance import export_negative, mix_weights, negative_guidance
from diffalign.guidance.branches import rescale_guided
from diffalign.guidance.mixing import base_weights, merged_weights, network_of
from diffalign.pipelines import adapter_for
from diffalign.synthesis import generate_images
from tests.guidance.conftest import BUILDERS, LORA_ALPHA, LORA_RANK, STEPS, draw, write_lora
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

FAMILIES = list(BUILDERS)


def merged(builder, *folders, scales=None):
    """A pipeline whose weights are W + sum of scale * alpha / r * B A, computed here from the files."""
    pipe = builder()
    denoiser = adapter_for(pipe).denoiser
    weights = denoiser.state_dict()
    for folder, scale in zip(folders, scales or [1.0] * len(folders), strict=True):
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        for key, down in tensors.items():
            if ".lora_A." in key:
                up = tensors[key.replace(".lora_A.", ".lora_B.")]
                name = key.split(".", 1)[1].replace(".lora_A.", ".")
                weights[name] = weights[name] + scale * (LORA_ALPHA / LORA_RANK) * up @ down
    denoiser.load_state_dict(weights)
    return pipe


def with_adapter(builder, folder):
    """A denoiser with a LoRA loaded by diffusers, as ``n``."""
    pipe = builder()
    pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name="n")
    return adapter_for(pipe).denoiser


def by_hand(positive, negative, family: str, guidance: float) -> torch.Tensor:
    """Two pipelines' denoisers, each called for its branch, by replacing ``forward`` of the positive one."""
    network, other = adapter_for(positive).denoiser, adapter_for(negative).denoiser
    forward = network.forward
    calls = {"n": 0}

    def stacked(*args, **kwargs):
        both, wrong = forward(*args, **kwargs)[0], other(*args, **kwargs)[0]
        return (torch.cat([wrong.chunk(2)[0], both.chunk(2)[1]]),)

    def alternating(*args, **kwargs):
        calls["n"] += 1
        return (forward if calls["n"] % 2 else other)(*args, **kwargs)

    network.forward = alternating if family == "flux" else stacked
    try:
        return draw(positive, family, guidance)
    finally:
        del network.forward


@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_is_predicted_by_its_own_network(family, loras):
    builder, (negative, positive) = BUILDERS[family], loras[family]
    expected = by_hand(builder(), merged(builder, negative), family, 4.0)
    pipe = builder()
    plain = draw(pipe, family)
    with negative_guidance(pipe, negative) as calls:
        got = draw(pipe, family)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)
    assert calls.negative_calls == calls.positive_calls == STEPS
    assert torch.equal(draw(pipe, family), plain), "the pipeline is what it was"
    # with an aligned LoRA in the other branch, a share of which is mixed into the negative one
    expected = by_hand(merged(builder, positive), merged(builder, positive, negative, scales=[0.5, 0.8]), family, 4.0)
    with negative_guidance(pipe, negative, positive, alpha=0.5, beta=0.8):
        got = draw(pipe, family)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_as_negative_is_plain_guidance(family):
    pipe = BUILDERS[family]()
    plain = draw(pipe, family)
    base = copy.deepcopy(adapter_for(pipe).denoiser)
    with negative_guidance(pipe, base) as calls:
        got = draw(pipe, family)
    assert calls.negative_calls == STEPS
    assert (got - plain).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_as_negative_is_plain_guidance_to_one_in_a_million(family):
    """In fp32 a network rounds otherwise for 2 items than for 4, and guidance multiplies that: see the next test."""
    pipe = BUILDERS[family]().to(torch.float64)
    plain = draw(pipe, family)
    with negative_guidance(pipe, copy.deepcopy(adapter_for(pipe).denoiser)):
        got = draw(pipe, family)
    assert (got - plain).abs().max() < 1e-6 * plain.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_is_its_own_negative(family, loras):
    """The shortest way to write plain guidance: by the pipeline or by its network, also when an adapter comes later."""
    pipe = BUILDERS[family]().to(torch.float64)
    plain = draw(pipe, family)
    for negative in (pipe, adapter_for(pipe).denoiser):
        with negative_guidance(pipe, negative) as calls:
            got = draw(pipe, family)
        assert calls.negative_calls == STEPS
        assert (got - plain).abs().max() < 1e-6 * plain.abs().max()
    assert torch.equal(draw(pipe, family), plain)
    pipe = BUILDERS[family]()
    positive = loras[family][1]
    expected = by_hand(merged(BUILDERS[family], positive), BUILDERS[family](), family, 4.0)
    with negative_guidance(pipe, pipe, positive):
        torch.testing.assert_close(draw(pipe, family), expected, rtol=1e-4, atol=1e-4)
    with negative_guidance(pipe, pipe), lora_loaded(pipe, positive / "pytorch_lora_weights.safetensors"):
        torch.testing.assert_close(draw(pipe, family), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("as_positive", [False, True])
def test_a_users_network_keeps_its_mode(as_positive, loras):
    pipe, other = tiny_sd(), tiny_sd(seed=1).unet.train()
    other.mid_block.eval()
    modes = [module.training for module in other.modules()]
    with negative_guidance(pipe, *((loras["sd"][0], other) if as_positive else (other,))):
        assert not any(module.training for module in other.modules())
    assert [module.training for module in other.modules()] == modes


def test_what_is_left_in_fp32_is_the_networks_own_rounding():
    """Both halves in one call, as the pipeline makes it: the same bits. Each by itself: the last digits differ."""
    network = tiny_sd().unet
    inputs = {"sample": torch.randn(4, 4, 8, 8), "timestep": torch.tensor(500)}
    told = torch.randn(4, 77, 16)
    with torch.no_grad():
        whole = network(**inputs, encoder_hidden_states=told).sample
        again = network(**inputs, encoder_hidden_states=told).sample
        parts = zip(inputs["sample"].split(2), told.split(2), strict=True)
        halves = [network(x, inputs["timestep"], c).sample for x, c in parts]
    assert torch.equal(whole, again)
    assert (torch.cat(halves) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_guidance_the_negative_model_is_not_called_and_this_is_said(family, loras, caplog):
    pipe = BUILDERS[family]()
    plain = draw(pipe, family, 1.0)
    with caplog.at_level(logging.WARNING), negative_guidance(pipe, loras[family][0]) as calls:
        got = draw(pipe, family, 1.0)
    assert calls.negative_calls == 0 and torch.equal(got, plain)
    assert "never called" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_the_interval_only_the_conditional_model_predicts(family, loras):
    pipe = BUILDERS[family]()
    negative = loras[family][0]
    with negative_guidance(pipe, negative, interval=(0.3, 0.6)) as calls:
        draw(pipe, family)
    assert calls.negative_calls == 1 and calls.positive_calls == STEPS
    with negative_guidance(pipe, negative, interval=(1 / STEPS, 2 / STEPS)) as calls:  # its end is not part of it
        draw(pipe, family)
    assert calls.negative_calls == 1
    unguided = draw(pipe, family, 1.0)
    with negative_guidance(pipe, negative, interval=(0.999, 1.0)) as calls:
        got = draw(pipe, family)
    assert calls.negative_calls == 0
    torch.testing.assert_close(got, unguided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_rescale_is_that_of_diffusers(family):
    pipe = BUILDERS[family]()
    expected = draw(pipe, family, guidance_rescale=0.7)
    with negative_guidance(pipe, copy.deepcopy(pipe.unet), rescale=0.7):
        got = draw(pipe, family)
        with pytest.raises(ConfigError, match="give one"):
            draw(pipe, family, guidance_rescale=0.7)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert "step" not in pipe.scheduler.__dict__


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_rescale_works_where_diffusers_has_none(family):
    pipe = BUILDERS[family]()
    spreads = []
    step = type(pipe.scheduler).step

    def spy(scheduler, model_output, *args, **kwargs):
        spreads.append(model_output.flatten(1).std(1))
        return step(scheduler, model_output, *args, **kwargs)

    type(pipe.scheduler).step = spy
    try:
        for guidance, rescale in ((1.0, 0.0), (4.0, 1.0), (4.0, 0.0)):
            with negative_guidance(pipe, copy.deepcopy(pipe.transformer), rescale=rescale):
                draw(pipe, family, guidance)
    finally:
        type(pipe.scheduler).step = step
    unguided, rescaled, guided = spreads[0], spreads[STEPS], spreads[2 * STEPS]
    torch.testing.assert_close(rescaled, unguided, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided, unguided, rtol=1e-4)


def test_rescale_numbers():
    guided, conditional = torch.randn(2, 4, 8, 8) * 3, torch.randn(2, 4, 8, 8)
    out = rescale_guided(guided, conditional, 1.0)
    torch.testing.assert_close(out.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(rescale_guided(guided, conditional, 0.25), 0.25 * out + 0.75 * guided)


# --- what the negative branch is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_embeddings_of_the_negative_branch(family, loras):
    pipe, negative = BUILDERS[family](), loras[family][0]
    drawn = {}
    for embedding in ("default", "empty", "zeros", "prompt"):
        with negative_guidance(pipe, negative, embedding=embedding):
            drawn[embedding] = draw(pipe, family)
    if family == "sdxl":  # what the pipeline makes of an absent negative prompt
        torch.testing.assert_close(drawn["default"], drawn["zeros"], rtol=1e-4, atol=1e-5)
    for a, b in (("empty", "zeros"), ("empty", "prompt")):
        assert not torch.allclose(drawn[a], drawn[b], atol=1e-4), (a, b)
    base = copy.deepcopy(adapter_for(pipe).denoiser)
    with negative_guidance(pipe, base, embedding="prompt"):  # both branches equal: guidance has nothing to do
        torch.testing.assert_close(draw(pipe, family), draw(pipe, family, 1.0), rtol=1e-4, atol=1e-5)


def test_a_negative_prompt_reaches_the_negative_model(loras):
    pipe = tiny_sdxl()
    with negative_guidance(pipe, loras["sdxl"][0]):
        absent, given = draw(pipe, "sdxl"), draw(pipe, "sdxl", negative_prompt=["ugly", "blue"])
    assert not torch.allclose(absent, given, atol=1e-4)


# --- states of the pipeline ---------------------------------------------------------------------------------------


def test_active_adapters_are_the_positive_model_and_stay_as_they_were(loras):
    negative, positive = loras["sdxl"]
    pipe = tiny_sdxl()
    pipe.load_lora_weights(str(positive), weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    pipe.set_adapters("mine", 0.7)
    plain = draw(pipe, "sdxl")
    expected = by_hand(
        merged(tiny_sdxl, positive, scales=[0.7]),
        merged(tiny_sdxl, positive, negative, scales=[0.35, 1.0]),
        "sdxl",
        4.0,
    )
    with negative_guidance(pipe, negative, alpha=0.5):
        got = draw(pipe, "sdxl")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe, "sdxl"), plain), "scales of the user's adapters survive"
    with pytest.raises(ConfigError, match="mine"), negative_guidance(pipe, negative, positive):
        pass


def test_adapters_that_come_and_go_inside_the_block(loras):
    """peft activates another adapter when the active one is deleted; that must not be the negative one."""
    negative, positive = loras["sd"]
    pipe = tiny_sd()
    with negative_guidance(pipe, negative):
        before = draw(pipe, "sd")
        with lora_loaded(pipe, positive / "pytorch_lora_weights.safetensors"):
            aligned = draw(pipe, "sd")
        after = draw(pipe, "sd")
    assert torch.equal(before, after)
    expected = by_hand(merged(tiny_sd, positive), merged(tiny_sd, negative), "sd", 4.0)
    torch.testing.assert_close(aligned, expected, rtol=1e-4, atol=1e-4)


def test_another_adapter_under_the_same_name_stays_out_of_the_negative_branch(loras, tmp_path):
    """It may sit in layers that the one before it had not: LoRAs are compared one after another in one block."""
    negative, positive = loras["sd"]
    first = write_lora(tiny_sd, tmp_path / "first", 5, targets=("to_q",)) / "pytorch_lora_weights.safetensors"
    pipe = tiny_sd()
    with negative_guidance(pipe, negative):
        with lora_loaded(pipe, first):
            draw(pipe, "sd")
        with lora_loaded(pipe, positive / "pytorch_lora_weights.safetensors"):  # to_q and to_v
            got = draw(pipe, "sd")
    expected = by_hand(merged(tiny_sd, positive), merged(tiny_sd, negative), "sd", 4.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_switched_off_stay_off_in_both_branches(loras):
    negative, positive = loras["sd"]
    pipe = tiny_sd()
    pipe.load_lora_weights(str(positive), weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    pipe.disable_lora()
    plain = draw(pipe, "sd")
    with negative_guidance(pipe, negative):
        got = draw(pipe, "sd")
    torch.testing.assert_close(got, by_hand(tiny_sd(), merged(tiny_sd, negative), "sd", 4.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe, "sd"), plain), "and after the block"
    with pytest.raises(ConfigError, match="no adapter is active"), negative_guidance(pipe, negative, alpha=0.5):
        pass


def test_the_pass_of_sd3_with_skipped_layers_is_no_conditional_prediction():
    """diffusers adds a third one after the first step, guided away from; rescale compares with the one before it."""
    pipe = tiny_sd3()
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    plain = draw(pipe, "sd3", **skipping)
    assert not torch.allclose(plain, draw(pipe, "sd3"), atol=1e-3)
    base, positive = copy.deepcopy(pipe.transformer), []
    pipe.transformer.register_forward_hook(lambda module, args, output: positive.append(output[0]))
    with negative_guidance(pipe, base) as calls:
        got = draw(pipe, "sd3", **skipping)
        assert torch.equal(calls._conditional, positive[-2]) and not torch.equal(calls._conditional, positive[-1])
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    assert (calls.positive_calls, calls.negative_calls) == (2 * STEPS - 1, STEPS)


def test_what_is_trainable_and_the_class_of_the_denoiser_are_put_back_after_an_error(loras):
    pipe = tiny_sd()
    kind = type(pipe.unet)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    with pytest.raises(RuntimeError), negative_guidance(pipe, loras["sd"][0]):
        assert type(pipe.unet).__name__ == kind.__name__
        raise RuntimeError
    assert type(pipe.unet) is kind and [p.requires_grad for p in pipe.unet.parameters()] == flags
    guided = negative_guidance(pipe, loras["sd"][0])
    with guided, pytest.raises(ConfigError, match="active in this"), negative_guidance(pipe, loras["sd"][0]):
        pass


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_generate_images(family, loras):
    pipe = BUILDERS[family]()
    arguments = {"prompts": ["a", "b", "a"], "seeds": [0, 0, 1], "steps": 2, "guidance": 4.0, "height": 32, "width": 32}
    plain = generate_images(pipe, **arguments)
    with negative_guidance(pipe, loras[family][0]) as calls:
        one = generate_images(pipe, **arguments, batch_size=1)
        assert calls.negative_calls == 6
        three = generate_images(pipe, **arguments, batch_size=3)
    for a, b in zip(one, three, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    assert any(a.tobytes() != b.tobytes() for a, b in zip(one, plain, strict=True))


def test_a_whole_pipeline_as_either_model(tmp_path, loras):
    negative, positive = loras["sd"]
    merged(tiny_sd, negative).save_pretrained(tmp_path / "negative")
    merged(tiny_sd, positive).save_pretrained(tmp_path / "positive")
    pipe = tiny_sd()
    unet = pipe.unet
    with negative_guidance(pipe, negative, positive, alpha=0.5):
        expected = draw(pipe, "sd")
    for other_negative, other_positive in (
        (tmp_path / "negative", tmp_path / "positive"),
        (tmp_path / "negative", positive),
        (negative, tmp_path / "positive"),
    ):
        with negative_guidance(pipe, other_negative, other_positive, alpha=0.5):
            torch.testing.assert_close(draw(pipe, "sd"), expected, rtol=1e-4, atol=1e-4)
        assert pipe.unet is unet


def test_dora_scales_only_when_merged(tmp_path):
    folder = write_lora(tiny_sd, tmp_path / "dora", 3, dora=True)
    pipe = tiny_sd()
    with negative_guidance(pipe, folder):
        whole = draw(pipe, "sd")
    other = tiny_sd()
    other.unet = with_adapter(tiny_sd, folder)
    assert torch.allclose(whole, by_hand(tiny_sd(), other, "sd", 4.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="DoRA"), negative_guidance(pipe, folder, beta=0.5):
        pass
    export_negative(pipe, tmp_path / "half", folder, beta=0.5, merged=True)
    with negative_guidance(pipe, tmp_path / "half"):
        got = draw(pipe, "sd")
    change = merged_weights(with_adapter(tiny_sd, folder), ["n"])
    half = tiny_sd()
    half.unet.load_state_dict(mix_weights(half.unet.state_dict(), negative=change, beta=0.5))
    torch.testing.assert_close(got, by_hand(tiny_sd(), half, "sd", 4.0), rtol=1e-4, atol=1e-4)


# --- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "as_network"), [("sdxl", False), ("flux", True)])
def test_an_export_is_read_back_with_its_settings(family, as_network, loras, tmp_path):
    negative, positive = loras[family]
    pipe = BUILDERS[family]()
    settings = {"alpha": 0.25, "beta": 0.5, "rescale": 0.3, "interval": (0.0, 0.6), "embedding": "empty"}
    folder = export_negative(pipe, tmp_path / "npo", negative, positive, **settings, merged=as_network)
    with negative_guidance(pipe, negative, positive, **settings):
        expected = draw(pipe, family)
    with negative_guidance(pipe, folder, positive if as_network else None):
        torch.testing.assert_close(draw(pipe, family), expected, rtol=1e-4, atol=1e-4)
    with negative_guidance(pipe, folder, positive if as_network else None, rescale=0.0):  # what is given wins
        assert not torch.allclose(draw(pipe, family), expected, atol=1e-4)
    with pytest.raises(ConfigError, match="exists already"):
        export_negative(pipe, folder, negative)


def test_an_export_is_taken_by_the_evaluation_and_by_the_demo(loras, tmp_path):
    """With its own settings, which their short names of models cannot say."""
    pipe, negative = tiny_sdxl(), loras["sdxl"][0]
    pipe.save_pretrained(tmp_path / "base")
    folder = export_negative(pipe, tmp_path / "npo", negative, beta=0.5, embedding="empty")
    plain = draw(pipe, "sdxl")
    with negative_guidance(pipe, negative, beta=0.5, embedding="empty"):
        expected = draw(pipe, "sdxl")
    assert not torch.allclose(expected, plain, atol=1e-3)
    (model,) = parse_models([f"npo={tmp_path / 'base'}?negative={folder}"])
    with switched_on(pipe, model, None):
        assert torch.equal(draw(pipe, "sdxl"), expected)
    with ModelPool(device="cpu").ready(parse_model(f"npo:{folder}", str(tmp_path / "base"))) as loaded:
        torch.testing.assert_close(draw(loaded, "sdxl"), expected, rtol=1e-4, atol=1e-4)


def test_a_damaged_export_is_refused(tmp_path, loras):
    folder = export_negative(tiny_sd(), tmp_path / "npo", loras["sd"][0])
    (folder / "negative.json").write_text('{"version": 2, "kind": "lora"}')
    with pytest.raises(CheckpointError, match="version 2"), negative_guidance(tiny_sd(), folder):
        pass


# --- mixing and refusals ------------------------------------------------------------------------------------------


def test_weights_are_mixed_by_name_whatever_their_order():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "count": torch.tensor(7)}
    positive = {"b": torch.tensor([5.0]), "count": torch.tensor(9), "a": torch.tensor([2.0, 2.0])}
    negative = {"count": torch.tensor(9), "a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])}
    for (alpha, beta), a, b in (
        ((0, 0), [1.0, 2.0], 3.0),
        ((1, 0), [2.0, 2.0], 5.0),
        ((0, 1), [1.0, 0.0], 0.0),
        ((0.5, 1), [1.5, 0.0], 1.0),
    ):
        mixed = mix_weights(base, positive=positive, negative=negative, alpha=alpha, beta=beta)
        assert list(mixed) == list(base) and mixed["a"].tolist() == a and mixed["b"].item() == b and mixed["count"] == 7
    half = {name: w.bfloat16() if w.is_floating_point() else w for name, w in base.items()}
    tiny = mix_weights({"a": torch.ones(1).bfloat16()}, negative={"a": torch.ones(1) + 2**-7}, beta=1.0)
    assert tiny["a"].dtype == torch.bfloat16 and tiny["a"].item() == 1 + 2**-7  # the bf16 next to 1: no detour loses it
    assert mix_weights(half, negative=negative)["a"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="another architecture"):
        mix_weights(base, negative={"a": base["a"]})


def test_coefficients_of_guidance_add_up_to_one():
    """eps = g eps_pos + (1 - g) eps_neg; with unit variance and correlation rho its variance is as derived."""
    g = 7.5
    assert (g, 1 - g) == (7.5, -6.5)
    torch.manual_seed(0)
    a, b = torch.randn(2, 200_000, dtype=torch.float64)
    for rho, expected in ((0.0, 98.5), (1.0, 1.0), (0.5, 98.5 - 2 * 7.5 * 6.5 * 0.5)):
        negative = rho * a + (1 - rho**2) ** 0.5 * b
        assert abs((g * a + (1 - g) * negative).var().item() - expected) < 0.01 * expected + 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.5}, "no adapter is active"),
        ({"embedding": "none"}, "embedding must be one of"),
        ({"rescale": 2.0}, "rescale must lie"),
        ({"interval": (0.5, 0.5)}, "interval must be"),
        ({"interval": (0.5,)}, "interval must be"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message, loras):
    with pytest.raises(ConfigError, match=message), negative_guidance(tiny_sd(), loras["sd"][0], **settings):
        pass


def test_models_that_do_not_fit_are_refused(loras, tmp_path):
    with pytest.raises(CheckpointError), negative_guidance(tiny_sd(), loras["sd3"][0]):
        pass
    with pytest.raises(CheckpointError, match="another architecture"), negative_guidance(tiny_sd(), tiny_sdxl().unet):
        pass
    with pytest.raises(CheckpointError, match="does not exist"), negative_guidance(tiny_sd(), tmp_path / "nothing"):
        pass
    pipe = tiny_sd()
    pipe.load_lora_weights(str(loras["sd"][1]), weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    pipe.fuse_lora()
    with pytest.raises(ConfigError, match="fused"), negative_guidance(pipe, loras["sd"][0]):
        pass


def test_offloading_hooks_between_pictures_do_not_lose_the_negative_model(loras):
    """accelerate replaces and restores ``forward``; the answer must survive it."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe = tiny_sd()
    with negative_guidance(pipe, loras["sd"][0]):
        expected = draw(pipe, "sd")
    add_hook_to_module(pipe.unet, ModelHook())
    with negative_guidance(pipe, loras["sd"][0]) as calls:
        assert torch.equal(draw(pipe, "sd"), expected)
        remove_hook_from_module(pipe.unet)
        add_hook_to_module(pipe.unet, ModelHook())
        assert torch.equal(draw(pipe, "sd"), expected)
    assert calls.negative_calls == 2 * STEPS


def test_a_network_copied_for_mixing_has_no_adapters(loras):
    adapted = with_adapter(tiny_sd3, loras["sd3"][0])
    plain = network_of(adapted, base_weights(adapted))
    reference = tiny_sd3().transformer
    assert list(plain.state_dict()) == list(reference.state_dict())
    for name, weight in reference.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight)


def test_flux_with_a_guidance_embedding_is_warned_without_true_guidance(loras, caplog):
    pipe = tiny_flux()
    with caplog.at_level(logging.WARNING), negative_guidance(pipe, loras["flux"][0]):
        pipe("a", num_inference_steps=1, height=32, width=32, output_type="latent", max_sequence_length=32)
    assert "true_cfg_scale" in caplog.text
