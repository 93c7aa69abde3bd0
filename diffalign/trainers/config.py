"""Settings of a training run. Every field is read by the trainer; `diffalign train --help` is made from this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def option(default: Any, help: str) -> Any:
    """A dataclass field with its explanation."""
    metadata = {"help": help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TrainingConfig:
    """What every trainer shares."""

    has_reference: ClassVar[bool] = True  # whether the method compares with a reference model

    # Where results go
    output_dir: str = option("out", "Folder of checkpoints, logs, validation images and the final weights.")
    resume: str = option(
        "none", "`none` refuses a folder that holds another run, `latest` continues it, or the path of a checkpoint."
    )
    seed: int = option(0, "Key of all randomness of the run.")

    # How long and how much
    max_steps: int | None = option(None, "Optimizer steps; None takes max_epochs.")
    max_epochs: float | None = option(None, "Passes over the data; used when max_steps is None (then required).")
    batch_size: int = option(4, "Pairs (or lists) per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")

    # Optimizer
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = option(
        "adamw", "`adamw_8bit` needs bitsandbytes; `adafactor` is transformers' with a fixed learning rate."
    )
    learning_rate: float = option(1e-5, "Peak learning rate; never rescaled by batch size or process count.")
    lr_schedule: str = option("constant_with_warmup", "Name of a diffusers schedule: constant, linear, cosine, ...")
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    adam_beta1: float = option(0.9, "AdamW's first-moment decay.")
    adam_beta2: float = option(0.999, "AdamW's second-moment decay.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    weight_decay: float = option(1e-2, "Decoupled weight decay.")
    max_grad_norm: float | None = option(1.0, "Clip the gradient's norm; None does not clip.")

    # What is trained
    adapter: Literal["lora", "dora", "none"] = option("lora", "`none` trains all weights of the denoiser.")
    lora_rank: int = option(16, "Rank of the adapter.")
    lora_alpha: float | None = option(None, "Scale of the adapter; None means equal to the rank.")
    lora_dropout: float = option(0.0, "Dropout inside the adapter while training.")
    lora_targets: list[str] = option(
        [], "Names (suffixes) of the modules that get an adapter; empty takes those usual for the model's family."
    )
    ema_decay: float | None = option(None, "Decay of the moving average that is validated and saved; None keeps none.")

    # Precision and memory
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Precision of weights at rest and of activations.")
    reference_dtype: Literal["same", "bf16", "fp16"] = option(
        "same", "Precision of the frozen copy in full fine-tuning; `same` makes it equal the policy exactly at step 0."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, far less memory.")
    attention: Literal["sdpa", "xformers", "eager"] = option("sdpa", "Attention kernel of policy and reference alike.")
    vae_dtype: Literal["fp32", "fp16", "bf16"] = option("fp32", "Precision in which images are encoded and decoded.")
    encode_batch_size: int = option(8, "Images or prompts encoded at once when the cache is filled.")

    # The model
    resolution: int | None = option(None, "Edge of a square training image in pixels; None takes the model's own.")
    max_prompt_tokens: int | None = option(
        None, "Tokens that T5 reads (SD3, FLUX); None takes the pipeline's own. Fewer make a smaller cache."
    )
    guidance_embedding: float | None = option(
        None, "What FLUX-dev's network is told as guidance while training; None means 1, plain conditional velocity."
    )
    zero_terminal_snr: bool = option(False, "Rescale the schedule to zero terminal SNR before training.")

    # Checkpoints
    save_every: int | None = option(None, "Optimizer steps between checkpoints; None saves only at the end.")
    keep_checkpoints: int | None = option(2, "How many checkpoints to keep; None keeps all.")

    # Watching
    log_every: int = option(10, "Optimizer steps between lines of metrics.")
    trackers: list[str] = option([], "tensorboard, wandb, trackio; metrics.jsonl is always written.")
    project_name: str = option("diffalign", "Project name given to the trackers.")
    progress_bar: bool = option(True, "Show a progress bar with rate and time left.")
    validate_every: int | None = option(None, "Optimizer steps between validation images; None makes none.")
    validation_prompts: list[str] = option([], "Prompts drawn by base and policy with the same seed, side by side.")
    validation_steps: int = option(25, "Sampling steps of validation images.")
    validation_guidance: float = option(5.0, "Guidance scale of validation images.")
    alarms: bool = option(True, "Warn in plain words when curves show a known failure.")

    # Sharing
    push_to_hub: bool = option(False, "Upload the final weights and model card.")
    hub_model_id: str | None = option(None, "Repository to push to; None makes one from the folder's name.")
    hub_private: bool = option(False, "Make that repository private.")


@dataclass(kw_only=True)
class PreferenceConfig(TrainingConfig):
    """What the methods share that learn from a table of ranked images."""

    takes_pairs: ClassVar[bool] = True  # or whole lists

    # Memory and speed
    images_per_pass: int | None = option(
        None, "Run this many images at once: the same gradients in less memory, for one more forward pass."
    )
    precompute_reference: int | None = option(
        None, "Find the reference's errors beforehand for this many draws per row; it then leaves memory."
    )

    # Data
    aspect_buckets: bool = option(True, "Train near each image's own shape instead of cropping to a square.")
    random_crop: bool = option(
        False, "Crop at a place keyed by the row instead of the centre (same for all its images)."
    )
    horizontal_flip: bool = option(False, "Mirror all images of a row with probability 1/2, drawn anew each epoch.")
    pairs: Literal["best_worst", "adjacent", "all"] = option(
        "best_worst", "Which pairs of a longer list are trained on."
    )
    min_margin: float = option(0.0, "Drop pairs whose preference differs by less than this.")
    ties: Literal["drop", "soft"] = option("drop", "Ties are dropped (and counted), or kept with probability 1/2.")
    curriculum_stages: int | None = option(
        None, "Train in this many stages of equal length, the clearest preferences first; None mixes all."
    )
    caption_dropout: float = option(
        0.0, "Share of rows trained without their prompt; one draw for all images of a row."
    )
    sample_latents: bool = option(
        True, "Sample the VAE's posterior (one noise for all images of a row), else its mean."
    )
    cache_dir: str | None = option(None, "Folder of encoded images and prompts; None means output_dir/cache.")
    cache_dtype: Literal["fp32", "fp16", "bf16"] = option("fp32", "Precision of cached latents.")

    # Noise levels
    min_timestep: int = option(0, "Lowest timestep trained on (inclusive).")
    max_timestep: int | None = option(None, "Highest timestep trained on (inclusive); None means the schedule's last.")
    timestep_density: Literal["default", "uniform", "logit_normal", "shift"] = option(
        "default", "How often each timestep is drawn. `default`: uniform, for flow models logit_normal."
    )
    density_mean: float = option(0.0, "Mean of logit_normal; above 0 prefers noisy timesteps.")
    density_std: float = option(1.0, "Standard deviation of logit_normal.")
    draws_per_row: int | None = option(
        None, "Return to the same noise and timesteps after this many epochs; None draws anew each epoch."
    )
    timesteps: list[int] = option([], "Train only on these timesteps, for example a Turbo model's 249, 499, 749, 999.")
    loss_space: Literal["default", "native", "epsilon", "x0"] = option(
        "default", "Space of the squared error. `default`: epsilon (beta keeps its meaning), for flow models native."
    )


@dataclass(kw_only=True)
class DPOConfig(PreferenceConfig):
    """Diffusion-DPO."""

    beta: float = option(5000.0, "Pull to the reference: logit = -beta/2 x error gap, errors averaged over C, H, W.")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = option("sigmoid", "Function of the logit that is minimised.")
    label_smoothing: float = option(0.0, "Share of labels taken to be wrong, below 1/2.")
    smoothing: Literal["conservative", "robust"] = option(
        "conservative", "What label_smoothing does: cDPO's mixture of both orders, or rDPO's unbiased estimate."
    )
    target_gradient_factor: float | None = option(
        None, "Let beta move so that this is the mean gradient factor, below 1/2; None keeps beta."
    )
    sft_weight: float = option(0.0, "Weight of the winner's own error; beta/40 is a tenth of the pull at the start.")


@dataclass(kw_only=True)
class MaPOConfig(PreferenceConfig):
    """Margin-aware preference optimization."""

    has_reference: ClassVar[bool] = False

    variant: Literal["code", "paper"] = option("code", "The authors' program, or the equations of the paper's v2.")
    margin_weight: float | None = option(None, "`code`: weight of the margin term, called beta there; None means 0.1.")
    kappa: float | None = option(None, "`code`: sharpness of the score; None means 0.5.")
    margin_scale: float | None = option(None, "`code`: temperature of the margin; None means 1000.")
    exponent: float | None = option(None, "`paper`: its beta; None means 128.")


@dataclass(kw_only=True)
class SmPOConfig(PreferenceConfig):
    """SmPO: smoothed preferences with inverted noise."""

    beta: float = option(5000.0, "As in DPO, for a pair of weight 1.")
    gamma: float = option(10.0, "Weight of a pair: gamma (2p - 1).")
    score: str | None = option(
        None, "Reward model whose scores give p; None means hard labels, p = 1: set gamma=1 for DPO's strength."
    )
    score_range: list[float] = option([], "Lowest and highest score; empty takes what is stored with the data set.")
    contradiction: Literal["follow_scores", "undecided", "drop"] = option(
        "undecided", "A pair whose loser scores higher: trained reversed, with p = 1/2, or left out."
    )
    inversion_steps: int = option(10, "Steps of an inversion to the last timestep; 0 trains on random noise.")
    renoise: int = option(1, "ReNoise iterations per step; 0 is plain DDIM inversion.")
    inverter: Literal["reference", "policy"] = option(
        "reference", "Model that inverts. The reference's inversions are cached; the policy's move with it."
    )
    sft_weight: float = option(0.0, "Weight of the winner's own error; beta/40 is a tenth of the pull at the start.")


@dataclass(kw_only=True)
class RankDPOConfig(PreferenceConfig):
    """RankDPO: all pairs of a ranked list, weighted by gain and discount."""

    takes_pairs: ClassVar[bool] = False

    beta: float = option(5000.0, "As in DPO.")
    list_size: int | None = option(None, "Train on this many candidates of a longer list; None takes all.")
    weighting: Literal["gain_discount", "gain", "none"] = option(
        "gain_discount", "Weight of a pair; `none` is DPO on all pairs of the list."
    )
    gain: Literal["exponential", "linear"] | None = option(None, "2^phi - 1 (None means this) or 2 phi - 1.")
    log_base: float | None = option(None, "Base of the discount's logarithm; None means 2.")
    rank_source: Literal["label", "model"] | None = option(
        None, "Ranks for the discount: from the labels (None means this), or from the implicit rewards."
    )
    sft_weight: float = option(0.0, "Weight of the best image's own error.")


@dataclass(kw_only=True)
class SFTConfig(PreferenceConfig):
    """Fine-tuning on the winners alone: the control of every preference method."""

    has_reference: ClassVar[bool] = False
