"""SD3 and FLUX: adapters say exactly what the pipelines themselves do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffalign.errors import ConfigError
from diffalign.pipelines import PipelineAdapter, adapter_for, load_pipeline, save_pipeline, supported_pipelines
from diffalign.pipelines.flux import pack, unpack
from tests.tiny import LATENT_SIZE, T5_WIDTH, TEXT_WIDTH, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

PIPELINES = {
    "sd3": tiny_sd3,
    "sd3.5": lambda: tiny_sd3(version="3.5"),
    "sd3-without-t5": lambda: tiny_sd3(t5=False),
    "flux-dev": tiny_flux,
    "flux-schnell": lambda: tiny_flux(guidance=False),
}
PROMPT = "a red circle"
SIZE = {"height": 32, "width": 48}  # not square: transposed rows and columns would show


@pytest.fixture(params=PIPELINES)
def adapter(request) -> PipelineAdapter:
    return adapter_for(PIPELINES[request.param]())


def recorded(adapter: PipelineAdapter, **arguments) -> list[tuple[dict, torch.Tensor]]:
    """What the pipeline passes to its transformer while it samples, and what comes back."""
    calls = []

    def record(module, args, kwargs, output):
        assert not args
        tensors = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
        calls.append((tensors, output[0].clone()))

    hook = adapter.denoiser.register_forward_hook(record, with_kwargs=True)
    adapter.pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **SIZE, **arguments)
    hook.remove()
    return calls


def inside(adapter: PipelineAdapter, *arguments, **options) -> tuple[torch.Tensor, dict]:
    """The adapter's prediction, and what the transformer was given for it."""
    given = {}
    hook = adapter.denoiser.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    predicted = adapter.predict(adapter.denoiser, *arguments, **options)
    hook.remove()
    return predicted, given


def test_geometry(adapter):
    flux = adapter.family == "flux"
    assert (adapter.vae_scale_factor, adapter.size_multiple, adapter.latent_channels) == (4, 8, 16)
    assert adapter.native_resolution == (128 * 4 if flux else 32)  # FLUX's configuration holds no size: 1024 pixels
    assert adapter.denoiser is adapter.pipeline.transformer
    assert adapter.noise_schedule().prediction_type == "flow"
    assert {"StableDiffusion3Pipeline", "FluxPipeline"} <= set(supported_pipelines())


def test_size_multiple_of_unets_is_their_depth():
    assert adapter_for(tiny_sdxl()).size_multiple == adapter_for(tiny_sd()).size_multiple == 4 * 2**2


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_predictions_are_the_pipelines_own(adapter, guidance):
    """Recorded from inside a true sampling run: prompts, positions, times, guidance and output all agree."""
    flux, embeds = adapter.family == "flux", getattr(adapter, "embeds_guidance", False)
    scale = "true_cfg_scale" if flux and not embeds else "guidance_scale"
    negative = {"negative_prompt": ""} if flux else {}
    calls = recorded(adapter, prompt=PROMPT, **{scale: guidance}, **negative)
    guided = guidance > 1 and not embeds
    assert len(calls) == (4 if flux and guided else 2)
    prompt, empty = adapter.encode_prompts([PROMPT]), adapter.unconditional()
    if embeds:
        adapter.guidance_embedding = guidance
    for number, (given, output) in enumerate(calls):
        if flux:  # one call per branch
            noisy = unpack(given["hidden_states"], 8, 12)
            time, conditioning = given["timestep"] * 1000, empty if guided and number % 2 else prompt
            output = unpack(output, 8, 12)
        else:
            noisy, time = given["hidden_states"], given["timestep"]
            conditioning = {k: torch.cat([empty[k], v]) for k, v in prompt.items()} if guided else prompt
        ours, passed = inside(adapter, noisy, time, conditioning, torch.zeros(len(noisy), 6))
        passed = {name: value for name, value in passed.items() if isinstance(value, torch.Tensor)}
        assert passed.keys() == given.keys()
        for name, value in given.items():
            assert torch.allclose(passed[name], value, atol=1e-6), name
            assert passed[name].shape == value.shape
        assert torch.allclose(ours, output, atol=1e-5) and ours.shape == noisy.shape


def test_times_are_those_of_the_samplers_grid(adapter):
    """sigma = time / 1000 for both families, and the schedule's highest is the sampler's first."""
    (given, _), *_ = recorded(adapter, prompt=PROMPT)
    schedule = adapter.noise_schedule()
    last = schedule.time(torch.tensor([schedule.num_timesteps - 1]))
    _, passed = inside(adapter, torch.zeros(1, 16, 8, 8), last, adapter.encode_prompts([PROMPT]), torch.zeros(1, 6))
    assert torch.allclose(passed["timestep"], given["timestep"][:1])
    assert passed["timestep"].dtype == torch.float32


def test_prompts_are_the_pipelines_own_and_independent_of_the_batch(adapter):
    together = adapter.encode_prompts([PROMPT, "two blue stars on a white background"])
    alone = adapter.encode_prompts([PROMPT])
    pipeline = adapter.pipeline
    if adapter.family == "flux":
        embeds, pooled, _ = pipeline.encode_prompt(PROMPT)
        tokens, width = 512, TEXT_WIDTH
    else:
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
        tokens, width = 77 + 256, 2 * TEXT_WIDTH
    assert torch.equal(alone["prompt_embeds"], embeds) and torch.equal(alone["pooled_prompt_embeds"], pooled)
    assert embeds.shape == (1, tokens, T5_WIDTH) and pooled.shape == (1, width)
    assert together.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    for name, value in together.items():
        assert value.dtype == torch.float32 and value.device.type == "cpu" and not value.requires_grad
        assert torch.allclose(value[:1], alone[name], atol=1e-6)
        assert (value[0] - value[1]).abs().max() > 1e-3
        assert torch.allclose(adapter.unconditional()[name], adapter.encode_prompts([""])[name], atol=1e-6)


def test_shorter_prompts_are_another_identity_and_fit_the_sampler(adapter):
    identity = adapter.encoder_identity()
    assert all(identity.values())
    if adapter.text_encoders[-1] is not getattr(adapter.pipeline, adapter.text_encoder_names[-1]):
        assert adapter.prompt_reader == (adapter.pipeline.tokenizer, 77)  # no T5
        return
    assert adapter.prompt_reader == (
        getattr(adapter.pipeline, adapter.tokenizer_names[-1]),
        adapter.max_sequence_length,
    )
    full = adapter.encode_prompts([PROMPT])["prompt_embeds"]
    shorter = adapter_for(adapter.pipeline)
    shorter.max_sequence_length = 64
    assert shorter.encode_prompts([PROMPT])["prompt_embeds"].shape[1] == full.shape[1] - (
        448 if adapter.family == "flux" else 192
    )
    assert shorter.encoder_identity()["text"] != identity["text"]


def test_sd3_without_t5_is_complete_and_another_identity(tmp_path):
    adapter = adapter_for(tiny_sd3(t5=False))
    embeds = adapter.encode_prompts([PROMPT])["prompt_embeds"]
    assert embeds[:, 77:].abs().max() == 0 < embeds[:, :77].abs().max()
    identity = adapter.encoder_identity()["text"]
    assert identity != adapter_for(tiny_sd3()).encoder_identity()["text"]
    tokenizer_left = tiny_sd3()
    tokenizer_left.text_encoder_3 = None
    assert adapter_for(tokenizer_left).encoder_identity()["text"] == identity
    assert adapter.missing_encoders == []
    save_pipeline(adapter, tmp_path / "final")
    reloaded = load_pipeline(tmp_path / "final")
    assert reloaded.text_encoder_3 is None
    assert adapter_for(reloaded).encoder_identity()["text"] == identity


def test_encoders_that_were_dropped_are_missing_t5_too():
    adapter = adapter_for(tiny_sd3())
    identity = adapter.encoder_identity()
    adapter.drop_encoders()
    assert adapter.missing_encoders == ["vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    assert adapter.encoder_identity() == identity
    with pytest.raises(ConfigError, match="not loaded"):
        adapter.encode_prompts([PROMPT])
    without = tiny_sd3()
    without.vae = without.text_encoder = without.text_encoder_2 = without.text_encoder_3 = None
    assert adapter_for(without).encoder_identity() == {"vae": None, "text": None}
    assert adapter_for(without).latent_channels == 16


# --- time shift ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_shape", [(8, 8), (8, 12), (128, 128), (64, 96)])
def test_time_shift_is_the_schedulers(adapter, latent_shape):
    scheduler = copy.deepcopy(adapter.pipeline.scheduler)
    tokens = latent_shape[0] * latent_shape[1] // 4
    dynamic = {"mu": calculate_shift(tokens, max_shift=1.15)} if scheduler.config.use_dynamic_shifting else {}
    plain = np.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=plain, **dynamic)
    s = adapter.time_shift(latent_shape)
    assert np.allclose(scheduler.sigmas[:-1].numpy(), s * plain / (1 + (s - 1) * plain), atol=1e-6)


def test_time_shift_of_known_models():
    assert adapter_for(tiny_sd3()).time_shift((128, 128)) == 3.0
    assert adapter_for(tiny_flux()).time_shift((128, 128)) == pytest.approx(np.exp(1.15))  # 1024 pixels, 4096 tokens
    assert adapter_for(tiny_flux()).time_shift((32, 32)) == pytest.approx(np.exp(0.5))
    assert adapter_for(tiny_flux(guidance=False)).time_shift((128, 128)) == 1.0
    assert adapter_for(tiny_sdxl()).time_shift((128, 128)) == 1.0
    flux = tiny_flux()
    flux.scheduler.register_to_config(time_shift_type="linear")
    assert adapter_for(flux).time_shift((128, 128)) == pytest.approx(1.15)


# --- FLUX ------------------------------------------------------------------------------------------------------


def test_packing_is_the_pipelines_own_and_has_an_inverse():
    latents, pipeline = torch.randn(2, 16, 8, 12), tiny_flux()
    assert torch.equal(pack(latents), pipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(unpack(pack(latents), 8, 12), latents)
    assert torch.equal(pipeline._unpack_latents(pack(latents), 32, 48, 4), latents)


def test_guidance_embedding_reaches_dev_and_not_schnell():
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([500.0, 20.0])
    for embeds in (True, False):
        adapter = adapter_for(tiny_flux(guidance=embeds))
        conditioning = adapter.encode_prompts([PROMPT, "x"])
        outputs = []
        for told in (adapter.guidance_embedding, 3.5):
            adapter.guidance_embedding = told
            predicted, given = inside(adapter, *inputs, conditioning, torch.zeros(2, 6))
            assert given["guidance"].tolist() == [told, told] if embeds else given["guidance"] is None
            outputs.append(predicted)
        assert torch.equal(*outputs) != embeds
    assert adapter_for(tiny_flux()).guidance_embedding == 1.0


def test_positions_and_times_stay_fp32_into_a_bf16_network(adapter):
    conditioning = adapter.encode_prompts([PROMPT])
    adapter.denoiser.to(torch.bfloat16)
    arguments = (torch.randn(1, 16, 8, 8), torch.tensor([333.0]), conditioning, torch.zeros(1, 6))
    predicted, given = inside(adapter, *arguments, dtype=torch.bfloat16)
    assert predicted.dtype == given["hidden_states"].dtype == given["encoder_hidden_states"].dtype == torch.bfloat16
    for name in {"timestep", "img_ids", "txt_ids", "guidance"} & given.keys():
        assert given[name] is None or given[name].dtype == torch.float32


def test_control_and_fill_transformers_are_refused():
    flux, sd3 = tiny_flux(), tiny_sd3()
    flux.transformer = FluxTransformer2DModel.from_config(flux.transformer.config, in_channels=128, out_channels=64)
    sd3.transformer = SD3Transformer2DModel.from_config(sd3.transformer.config, in_channels=33)
    for pipeline, channels in ((flux, 32), (sd3, 33)):
        with pytest.raises(ConfigError, match=f"{channels} channels but latents have 16"):
            adapter_for(pipeline)


# --- images and sampling ---------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled_as_the_vae_says(adapter):
    pixels = torch.randint(0, 256, (1, 3, 32, 48), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1
    moments = adapter.encode_images(pixels)
    assert moments.shape == (1, 32, LATENT_SIZE, 12)
    mean = adapter.pipeline.vae.encode(pixels).latent_dist.mode()
    assert torch.allclose(adapter.latents(moments), (mean - 0.06) * 0.5, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_from_embeddings_is_sampling_from_prompts(adapter, guidance):
    """What validation pictures are drawn with: the pipeline's own loop from cached tensors and given noise."""
    pipeline, generator = adapter.pipeline, torch.Generator().manual_seed(0)
    noise = torch.randn(2, 16, 8, 12, generator=generator)
    prompts = [PROMPT, "two stars"]
    flux, embeds = adapter.family == "flux", getattr(adapter, "embeds_guidance", False)
    guided = {"guidance_scale": guidance}
    if flux and not embeds:
        guided = {"true_cfg_scale": guidance, "negative_prompt": ["", ""]}
    expected = pipeline(
        prompts, num_inference_steps=2, latents=pack(noise) if flux else noise, **guided, **SIZE, output_type="np"
    ).images
    arguments = adapter.sampling_arguments(
        adapter.encode_prompts(prompts), adapter.unconditional(), noise, guidance=guidance
    )
    output = pipeline(**arguments, num_inference_steps=2, **SIZE, output_type="latent").images
    latents = adapter.sampled_latents(output, (8, 12))
    assert latents.shape == noise.shape
    shown = np.stack([np.asarray(image) for image in adapter.decode(latents)]) / 255
    assert np.abs(shown - expected).max() < 1 / 255


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_unet_families_sample_with_the_same_call(build):
    adapter = adapter_for(build())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    arguments = adapter.sampling_arguments(adapter.encode_prompts(["x"]), adapter.unconditional(), noise, 5.0)
    ours = adapter.sampled_latents(adapter.pipeline(**arguments, **size).images, (8, 8))
    assert torch.allclose(ours, adapter.pipeline("x", latents=noise, guidance_scale=5.0, **size).images, atol=1e-5)


# --- attention -------------------------------------------------------------------------------------------------


def test_attention_kernels(adapter):
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([500.0]), adapter.encode_prompts([PROMPT]), torch.zeros(1, 6)
    default = adapter.predict(adapter.denoiser, *inputs)
    adapter.set_attention("sdpa")
    assert torch.equal(adapter.predict(adapter.denoiser, *inputs), default)
    if adapter.family == "sd3":
        with pytest.raises(ConfigError, match="eager does not exist for SD3"):
            adapter.set_attention("eager")
        return
    adapter.set_attention("eager")
    eager = adapter.predict(adapter.denoiser, *inputs)
    assert torch.allclose(eager, default, atol=1e-5)
    reference = copy.deepcopy(adapter.denoiser)
    assert {p._attention_backend.value for p in reference.attn_processors.values()} == {"_native_math"}
    assert torch.equal(adapter.predict(reference, *inputs), eager)
    fresh = adapter_for(tiny_flux(guidance=adapter.embeds_guidance))  # no other network is touched
    assert {p._attention_backend for p in fresh.denoiser.attn_processors.values()} == {None}


def test_gradient_checkpointing_changes_nothing(adapter):
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([500.0]), adapter.encode_prompts([PROMPT]), torch.zeros(1, 6)
    network = adapter.denoiser.requires_grad_(True).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        adapter.predict(network, *inputs).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0
