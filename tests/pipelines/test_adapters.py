"""Adapters say exactly what the pipelines themselves do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from diffalign.errors import ConfigError, DataError
from diffalign.pipelines import PipelineAdapter, adapter_for, supported_pipelines
from diffalign.pipelines.base import _FAMILIES
from tests.tiny import tiny_sd, tiny_sdxl

PIPELINES = {
    "sdxl": tiny_sdxl,
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
}


@pytest.fixture(params=PIPELINES)
def adapter(request) -> PipelineAdapter:
    return adapter_for(PIPELINES[request.param]())


def expanded(adapter: PipelineAdapter, prompts: list[str]) -> tuple[dict, torch.Tensor]:
    sizes = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).expand(len(prompts), -1)
    return adapter.encode_prompts(prompts), sizes


def test_geometry(adapter):
    assert (adapter.native_resolution, adapter.vae_scale_factor, adapter.latent_channels) == (32, 4, 4)
    assert adapter.denoiser is adapter.pipeline.unet
    assert adapter.family == ("sdxl" if "XL" in type(adapter.pipeline).__name__ else "sd")


def test_sizes_that_are_no_square_or_unknown_are_refused_where_a_square_is_asked_for():
    adapter = adapter_for(tiny_sd())
    adapter.denoiser.register_to_config(sample_size=[8, 16])
    assert adapter.native_size == (32, 64) and adapter.square_edge(48) == 48
    with pytest.raises(ConfigError, match="32 x 64 pixels, no squares: give resolution"):
        adapter.square_edge(None)
    adapter.denoiser.register_to_config(sample_size=None)
    with pytest.raises(ConfigError, match="no sample_size.*: give resolution"):
        adapter.square_edge(None)
    assert adapter.square_edge(48) == 48
    with pytest.raises(ConfigError, match="multiple of 16 pixels; got 40"):
        adapter.square_edge(40)


def test_prediction_type_comes_from_the_scheduler():
    assert adapter_for(tiny_sd()).noise_schedule().prediction_type == "epsilon"
    v = adapter_for(tiny_sd(prediction_type="v_prediction"))
    assert v.noise_schedule().prediction_type == "v_prediction"
    assert v.noise_schedule(zero_terminal_snr=True).alphas_cumprod[-1] == 0


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_predictions_are_the_pipelines_own(adapter, guidance):
    """Recorded from inside a true sampling run: prompts, empty prompt, time ids and network output all agree."""
    pipeline, calls = adapter.pipeline, []

    def record(module, args, kwargs, output):
        calls.append((args[0].clone(), args[1].clone(), output[0].clone()))

    hook = adapter.denoiser.register_forward_hook(record, with_kwargs=True)
    pipeline("a red circle", num_inference_steps=2, guidance_scale=guidance, generator=torch.Generator().manual_seed(0))
    hook.remove()
    prompt, sizes = expanded(adapter, ["a red circle"])
    empty = adapter.unconditional()
    rows = [empty, prompt] if guidance > 1 else [prompt]
    conditioning = {name: torch.cat([row[name] for row in rows]) for name in prompt}
    for noisy, t, output in calls:
        t = t.long().expand(len(rows))
        ours = adapter.predict(adapter.denoiser, noisy, t, conditioning, sizes.expand(len(rows), -1))
        assert torch.allclose(ours, output, atol=1e-6)
    assert len(calls) == 2


def test_prompts_are_fp32_on_the_cpu_without_gradient_and_independent_of_the_batch(adapter):
    together = adapter.encode_prompts(["a red circle", "two blue stars on a white background"])
    alone = adapter.encode_prompts(["a red circle"])
    expected = {"prompt_embeds", "pooled_prompt_embeds"} if adapter.family == "sdxl" else {"prompt_embeds"}
    assert together.keys() == expected
    for name, value in together.items():
        assert value.dtype == torch.float32 and value.device.type == "cpu" and not value.requires_grad
        assert torch.allclose(value[:1], alone[name], atol=1e-6)
    assert (together["prompt_embeds"][0] - together["prompt_embeds"][1]).abs().max() > 1e-3


def test_a_prompt_of_500_words_is_cut_by_the_tokenizer(adapter):
    embeds = adapter.encode_prompts(["red circle " * 250])["prompt_embeds"]
    assert embeds.shape[:2] == (1, 77)


def test_empty_prompt_of_sdxl_is_zeros_only_where_the_pipeline_says_so():
    pipeline = tiny_sdxl()
    assert all((value == 0).all() for value in adapter_for(pipeline).unconditional().values())
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    adapter = adapter_for(pipeline)
    for name, value in adapter.unconditional().items():
        assert torch.allclose(value, adapter.encode_prompts([""])[name], atol=1e-6)
    sd = adapter_for(tiny_sd())
    assert torch.allclose(sd.unconditional()["prompt_embeds"], sd.encode_prompts([""])["prompt_embeds"], atol=1e-6)


def test_time_ids_stay_fp32_into_the_sinusoid_of_a_bf16_network():
    adapter = adapter_for(tiny_sdxl())
    unet = adapter.denoiser
    embedded = []
    unet.add_time_proj.register_forward_hook(lambda module, args, output: embedded.append((args[0], output)))
    conditioning, _ = expanded(adapter, ["a red circle"])
    sizes = torch.tensor([[1023.0, 765.0, 3.0, 5.0, 1016.0, 760.0]])
    exact = unet.add_time_proj(sizes.flatten())
    unet.to(torch.bfloat16)
    out = adapter.predict(unet, torch.zeros(1, 4, 8, 8), torch.tensor([5]), conditioning, sizes, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    ids, sinusoid = embedded[-1]
    assert torch.equal(ids, sizes.flatten()) and torch.equal(sinusoid, exact)
    rounded = unet.add_time_proj(sizes.flatten().bfloat16())
    assert (rounded - exact).abs().max() > 0.1  # what the inference pipeline's own cast would have done
    with pytest.raises(ConfigError, match="float32"):
        adapter.predict(unet, torch.zeros(1, 4, 8, 8), torch.tensor([5]), conditioning, sizes.bfloat16())


def test_size_ids_reach_sdxl_and_not_sd(adapter):
    conditioning, sizes = expanded(adapter, ["a red circle"])
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    one = adapter.predict(adapter.denoiser, noisy, t, conditioning, sizes)
    other = adapter.predict(adapter.denoiser, noisy, t, conditioning, sizes + 100)
    assert torch.equal(one, other) == (adapter.family == "sd")
    assert adapter.size_conditioning(sizes).keys() == ({"time_ids"} if adapter.family == "sdxl" else set())


# --- images ----------------------------------------------------------------------------------------------------


def pixels(n: int = 2) -> torch.Tensor:
    values = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return values.float() / 127.5 - 1


def test_latents_are_scaled_as_the_vae_says(adapter):
    moments = adapter.encode_images(pixels())
    assert moments.shape == (2, 8, 8, 8) and moments.dtype == torch.float32
    posterior = adapter.pipeline.vae.encode(pixels()).latent_dist
    scale = adapter.pipeline.vae.config.scaling_factor
    assert torch.allclose(adapter.latents(moments), posterior.mode() * scale, atol=1e-6)
    noise = torch.randn(2, 4, 8, 8)
    sampled = adapter.latents(moments, noise)
    assert torch.allclose(sampled, (posterior.mean + posterior.std * noise) * scale, atol=1e-6)


def test_decode_is_what_the_pipeline_shows(adapter):
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    latents = adapter.pipeline("a red circle", **arguments, output_type="latent").images
    arguments["generator"].manual_seed(0)
    shown = adapter.pipeline("a red circle", **arguments).images[0]
    assert np.array_equal(np.asarray(adapter.decode(latents)[0]), np.asarray(shown))


def test_latents_mean_and_std_are_used_where_a_vae_has_them():
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    adapter = adapter_for(pipeline)
    moments = adapter.encode_images(pixels())
    mean = moments.chunk(2, dim=1)[0]
    expected = (mean[:, 2] - 0.3) / 3.0 * pipeline.vae.config.scaling_factor
    assert torch.allclose(adapter.latents(moments)[:, 2], expected, atol=1e-6)
    latents = pipeline("x", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
    shown = pipeline("x", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(adapter.decode(latents.images)[0]), np.asarray(shown))


def test_vae_runs_in_fp32_unless_told_and_the_pipelines_own_is_left_alone():
    pipeline = tiny_sdxl()
    exact = adapter_for(pipeline).encode_images(pixels())
    half = adapter_for(pipeline, vae_dtype=torch.bfloat16).encode_images(pixels())
    assert pipeline.vae.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1
    pipeline.vae.to(torch.float16)
    from_half = adapter_for(pipeline).encode_images(pixels())
    assert pipeline.vae.dtype == torch.float16
    assert torch.allclose(from_half, exact, atol=1e-2) and (from_half - exact).abs().max() < (half - exact).abs().max()


def test_pixel_range_is_asserted_at_both_ends(adapter):
    """Slip 7 of the peers: [0, 1] images into a VAE that expects [-1, 1]."""
    good = pixels()
    for wrong, message in [
        ((good + 1) / 2, r"8-bit images are in \[0, 1\]"),
        ((good + 1) * 127.5, "x / 127.5 - 1"),
        (good * 1.5, "must lie in"),
        (good - 0.5, "must lie in"),
        (((good + 1) * 127.5).to(torch.uint8), "floating point"),
        (torch.full_like(good, float("nan")), "must lie in"),
        (good[:, :1], "shape"),
        (good[:, :, :30], "multiples of 4"),
    ]:
        with pytest.raises(DataError, match=message):
            adapter.encode_images(wrong)


def test_pale_pictures_are_legal(adapter):
    white = torch.ones(1, 3, 32, 32)
    pale = torch.randint(128, 256, (1, 3, 32, 32)).float() / 127.5 - 1
    resized = torch.nn.functional.interpolate(pale, size=(64, 64), mode="bilinear")
    for image in (white, pale, resized):
        assert adapter.encode_images(image).isfinite().all()


# --- encoders in and out of memory -----------------------------------------------------------------------------


def test_identity_is_the_content_and_nothing_else(adapter, tmp_path):
    identity = adapter.encoder_identity()
    assert identity.keys() == {"vae", "text"} and all(identity.values())
    adapter.encode_prompts(["something", "else"])  # leaves padding and truncation behind in the tokenizer
    adapter.pipeline.save_pretrained(tmp_path)
    reloaded = type(adapter.pipeline).from_pretrained(tmp_path)
    assert adapter_for(reloaded).encoder_identity() == identity
    adapter.denoiser.requires_grad_(True)
    with torch.no_grad():
        adapter.denoiser.conv_in.weight.add_(1)
    assert adapter_for(adapter.pipeline).encoder_identity() == identity


def test_identity_changes_with_each_part(adapter):
    pipeline, identity = adapter.pipeline, adapter.encoder_identity()
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.bias[0] += 1e-6
    changed = adapter_for(pipeline).encoder_identity()
    assert changed["vae"] != identity["vae"] and changed["text"] == identity["text"]
    with torch.no_grad():
        pipeline.text_encoder.final_layer_norm.bias[0] += 1e-6
    assert adapter_for(pipeline).encoder_identity()["text"] != identity["text"]
    half = adapter_for(pipeline, vae_dtype=torch.float16)
    assert half.encoder_identity()["vae"] != changed["vae"]
    half.vae_dtype = torch.float32
    assert half.encoder_identity()["vae"] == changed["vae"]
    pipeline.tokenizer.model_max_length = 50
    text = adapter_for(pipeline).encoder_identity()["text"]
    pipeline.tokenizer.model_max_length = 77
    assert text != adapter_for(pipeline).encoder_identity()["text"]


def test_dropped_encoders_leave_scale_and_identity_behind(adapter):
    identity, moments = adapter.encoder_identity(), adapter.encode_images(pixels())
    latents = adapter.latents(moments)
    adapter.drop_encoders()
    assert adapter.pipeline.vae is None and adapter.text_encoders == []
    assert adapter.encoder_identity() == identity
    assert torch.equal(adapter.latents(moments), latents)
    for call in (
        lambda: adapter.encode_prompts(["x"]),
        lambda: adapter.unconditional(),
        lambda: adapter.encode_images(pixels()),
        lambda: adapter.decode(latents),
    ):
        with pytest.raises(ConfigError, match="not loaded"):
            call()


def test_a_pipeline_without_encoders_has_no_identity():
    pipeline = tiny_sdxl()
    pipeline.vae = pipeline.text_encoder = pipeline.text_encoder_2 = None
    adapter = adapter_for(pipeline)
    assert adapter.encoder_identity() == {"vae": None, "text": None}
    with pytest.raises(ConfigError, match="without its VAE"):
        adapter.latents(torch.zeros(1, 8, 8, 8))


def test_offloading_keeps_encoders_usable(adapter):
    before = adapter.encode_prompts(["x"])["prompt_embeds"]
    adapter.offload_encoders()
    assert torch.equal(adapter.encode_prompts(["x"])["prompt_embeds"], before)


# --- attention and families ------------------------------------------------------------------------------------


def test_attention_kernels_agree_and_are_shared_with_a_copy(adapter):
    import copy

    conditioning, sizes = expanded(adapter, ["a red circle"])
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), conditioning, sizes
    outputs = {}
    for kind in ("sdpa", "eager"):
        adapter.set_attention(kind)
        kinds = {type(p) for p in adapter.denoiser.attn_processors.values()}
        reference = copy.deepcopy(adapter.denoiser)
        assert {type(p) for p in reference.attn_processors.values()} == kinds and len(kinds) == 1
        outputs[kind] = adapter.predict(adapter.denoiser, *inputs)
        assert torch.equal(adapter.predict(reference, *inputs), outputs[kind])
    assert torch.allclose(outputs["sdpa"], outputs["eager"], atol=1e-5)
    with pytest.raises(ConfigError, match="attention must be one of sdpa, xformers, eager; got 'flash'"):
        adapter.set_attention("flash")


def test_xformers_missing_is_one_clear_error(adapter, monkeypatch):
    monkeypatch.setattr("diffalign.pipelines.base.is_xformers_available", lambda: False)
    with pytest.raises(ConfigError, match="needs the package xformers.*pip install"):
        adapter.set_attention("xformers")


def test_unknown_families_are_named():
    sd = tiny_sd()
    pipeline = StableDiffusionInpaintPipeline(**{**sd.components, "image_encoder": None}, requires_safety_checker=False)
    with pytest.raises(ConfigError, match="StableDiffusionInpaintPipeline is not supported.*StableDiffusionXLPipeline"):
        adapter_for(pipeline)


def test_models_that_take_more_than_latents_are_refused():
    pipeline = tiny_sd()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    with pytest.raises(ConfigError, match="9 channels"):
        adapter_for(pipeline)


def test_a_stranger_adds_a_family_in_one_file():
    from diffalign.pipelines.sd import StableDiffusionAdapter

    class MyPipeline(type(tiny_sd())):
        pass

    class MyAdapter(StableDiffusionAdapter):
        family = "mine"
        pipeline_classes = ("MyPipeline",)

    try:
        pipeline = tiny_sd()
        pipeline.__class__ = MyPipeline
        assert adapter_for(pipeline).family == "mine"
        assert "MyPipeline" in supported_pipelines()
        assert adapter_for(tiny_sd()).family == "sd"
    finally:
        _FAMILIES.pop("MyPipeline", None)
