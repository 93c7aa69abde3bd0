"""Real diffusers pipelines at toy size: the true classes, random weights, built offline in well under a second.

Images are 32 x 32 pixels, latents 4 x 8 x 8, prompts 77 tokens (one per byte). The shapes of the true models are kept:
SDXL has three levels, two text encoders and time ids; SD has one text encoder and predicts epsilon or v. SD3 and FLUX
are flow-matching transformers with 16 latent channels and a T5 beside CLIP.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

IMAGE_SIZE = 32
LATENT_SIZE = 8
TEXT_WIDTH = 16
T5_WIDTH = 48  # wider than the two CLIPs of SD3 side by side, as in the true model
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with single bytes as its only words: any text encodes, nothing is downloaded."""
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer (a Unigram model) with single letters and a few words as its pieces."""
    words = ["\u2581red", "\u2581blue", "\u2581circle", "\u2581star", "\u2581square", "\u2581a", "\u2581two", "s"]
    letters = [chr(code) for code in range(33, 127) if chr(code) != "s"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(word, -3.0) for word in words] + [(letter, -6.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def tiny_vae(latent_channels: int = 4, **config) -> AutoencoderKL:
    """Without ``config`` a VAE as SD's; SD3 and FLUX have 16 channels, a shift and no 1 x 1 convolutions."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
        **{"scaling_factor": 0.5, **config},
    )


def tiny_sdxl(seed: int = 0, *, layers_per_block: int = 1) -> StableDiffusionXLPipeline:
    """A ready ``StableDiffusionXLPipeline`` (epsilon, zeros as the empty prompt)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(8, 16, 16),
            layers_per_block=layers_per_block,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=2 * TEXT_WIDTH,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        )
    return _ready(pipeline)


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon", *, layers_per_block: int = 1) -> StableDiffusionPipeline:
    """A ready ``StableDiffusionPipeline``; predicts ``epsilon`` (as SD1.5) or ``v_prediction`` (as SD2.1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(8, 16, 16),
            layers_per_block=layers_per_block,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=4,
        )
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(
                **NOISE, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipeline)


FLOW_VAE = {"latent_channels": 16, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}


def tiny_sd3(seed: int = 0, *, t5: bool = True, version: str = "3") -> StableDiffusion3Pipeline:
    """A ready ``StableDiffusion3Pipeline``; ``version="3.5"`` normalises q and k and has a block of dual attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
        newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if version == "3.5" else {}
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=LATENT_SIZE,
            **newer,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(**FLOW_VAE),
            text_encoder=CLIPTextModelWithProjection(tiny_text_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer)),
            tokenizer_2=tokenizer,
            text_encoder_3=tiny_t5(t5_tokenizer) if t5 else None,
            tokenizer_3=t5_tokenizer if t5 else None,
        )
    return _ready(pipeline)


def tiny_flux(seed: int = 0, *, guidance: bool = True) -> FluxPipeline:
    """A ready ``FluxPipeline``: with ``guidance`` as dev (guidance embedding, dynamic shift), else as schnell."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance, base_shift=0.5, max_shift=1.15
            ),
            vae=tiny_vae(**FLOW_VAE),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
        )
    return _ready(pipeline)


def _ready(pipeline):
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
