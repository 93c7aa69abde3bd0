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
        "same",
        "Precision of the frozen copy in full fine-tuning: `same` makes it equal the policy exactly at step 0; that of "
        "mixed_precision halves its memory.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, far less memory.")
    channels_last: bool = option(
        False, "Lay a UNet's weights out with channels last: the same results up to rounding; meant for GPUs."
    )
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
class NoiseLevelConfig(TrainingConfig):
    """What the methods share that learn from denoising errors."""

    # Noise levels
    min_timestep: int = option(0, "Lowest timestep trained on (inclusive).")
    max_timestep: int | None = option(None, "Highest timestep trained on (inclusive); None means the schedule's last.")
    timestep_density: Literal["default", "uniform", "logit_normal", "shift"] = option(
        "default", "How often each timestep is drawn. `default`: uniform, for flow models logit_normal."
    )
    density_mean: float = option(0.0, "Mean of logit_normal; above 0 prefers noisy timesteps.")
    density_std: float = option(1.0, "Standard deviation of logit_normal.")
    timesteps: list[int] = option([], "Train only on these timesteps, for example a Turbo model's 249, 499, 749, 999.")
    loss_space: Literal["default", "native", "epsilon", "x0"] = option(
        "default", "Space of the squared error. `default`: epsilon (beta keeps its meaning), for flow models native."
    )


@dataclass(kw_only=True)
class PreferenceConfig(NoiseLevelConfig):
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
    negative: bool = option(
        False, "Reverse all preferences: trains a negative model for guidance (Diffusion-NPO), not a better one."
    )
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
    draws_per_row: int | None = option(
        None, "Return to the same noise and timesteps after this many epochs; None draws anew each epoch."
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
        None, "Let beta move so that this is the mean gradient factor, below 1/2 (`sigmoid` only); None keeps beta."
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
        "reference", "Model that inverts. The reference's inversions are cached if they come again; the policy's move."
    )
    inversion_buckets: int | None = option(
        None,
        "Cut the timesteps into this many equal buckets and invert to the middle of each only, so that an image's "
        "cached inversions come again; needs sample_latents=false.",
    )
    sft_weight: float = option(
        0.0, "Weight of the error of the image that p says is better (none at 1/2); beta/40 is a tenth of DPO's pull."
    )


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


@dataclass(kw_only=True)
class SelfNPOConfig(TrainingConfig):
    """Self-NPO: a negative model for guidance, from prompts alone."""

    # The teacher
    teacher: Literal["frozen", "ema"] = option(
        "frozen", "The model at the start, or a moving average of the student, as in the authors' program."
    )
    teacher_decay: float | None = option(None, "`ema`: its decay; None means 0.999.")
    teacher_guidance: float = option(
        1.0, "Guidance scale of the teacher: 1 is conditional (the paper), 0 unconditional, below 0 against the prompt."
    )
    truncation_steps: int = option(5, "Steps of the teacher's walk from pure noise to where it stops.")

    # The student
    negative_share: float = option(
        0.25, "Share of rows on which the student is told the empty prompt that it gets when used, the teacher not."
    )
    loss: Literal["mse", "huber"] = option("mse", "Of the difference of clean latents: squared, or pseudo-Huber.")
    huber_c: float | None = option(None, "`huber`: where it turns from squared to absolute; None means 0.001.")
    loss_space: Literal["default", "native", "epsilon", "x0"] = option(
        "default", "Space of the difference. `default`: x0, which weighs noisy timesteps far above others."
    )
    min_timestep: int = option(0, "Lowest timestep the student is trained on (inclusive).")
    max_timestep: int | None = option(
        None, "Highest timestep the student is trained on (inclusive), the teacher stopping below it; None: the last."
    )
    cache_dir: str | None = option(None, "Folder of encoded prompts; None means output_dir/cache.")


@dataclass(kw_only=True)
class PrefGRPOConfig(NoiseLevelConfig):
    """Pref-GRPO: the policy's own pictures, judged within groups of one prompt; also plain GRPO on scores."""

    # What is learnt
    objective: Literal["sampling", "matching"] = option(
        "sampling",
        "Raise the density of the sampling steps that drew a picture (DDPO, Flow-GRPO), or lower its denoising errors "
        "in its place (AWM): far less noise in the gradient, deterministic rollouts, no gradient through guidance.",
    )
    matching_draws: int | None = option(
        None, "`matching`: noise levels at which each picture is denoised in an update; None means 4."
    )

    # Groups
    group_size: int = option(8, "Pictures of one prompt that are compared with each other.")
    prompts_per_rollout: int = option(4, "Prompts, hence groups, drawn before the weights change; over all processes.")
    updates_per_rollout: int = option(1, "Optimizer steps from one rollout, each on its share of the groups.")

    # Sampling
    sampling_steps: int = option(20, "Sampling steps of a rollout.")
    sampler: Literal["default", "ddim", "cps", "flow_sde", "dance_sde"] = option(
        "default", "How noise is injected; `default`: ddim, for flow models flow_sde."
    )
    noise_level: float | None = option(
        None, "How much; None takes the usual: ddim 1, cps 0.8, flow_sde 0.7, dance_sde 0.3."
    )
    guidance_scale: float = option(5.0, "Guidance of rollouts and of training alike; 1 switches it off in both.")
    guidance_gradient: Literal["both", "conditional"] = option(
        "both", "Gradient through both branches of the guidance, or through the conditional one alone."
    )
    shared_noise: bool = option(False, "Start all pictures of a group from the same noise.")
    latent_dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "Precision in which trajectories are kept.")
    cache_dir: str | None = option(None, "Folder of encoded prompts; None means output_dir/cache.")

    # Which steps are trained
    final_steps: int | None = option(
        None, "Last steps, drawn without noise and not trained; None means 2, for flow models 1."
    )
    sde_window: int | None = option(
        None, "Inject noise in this many neighbouring steps only, and train those; None takes all but the final ones."
    )
    sde_window_moves: Literal["random", "sliding"] = option(
        "random", "Where the window lies: drawn anew for each rollout, or moving from noise to picture."
    )
    sde_window_stay: int = option(1, "Rollouts that a sliding window stays in one place.")
    timestep_fraction: float = option(1.0, "Share of the stochastic steps that is trained, drawn for each rollout.")

    # Reward
    reward: Literal["win_rate", "score"] = option(
        "win_rate", "Win rates within the group (Pref-GRPO), or scores as they are (GRPO)."
    )
    rewards: list[str] = option([], "Reward models; options as name?key=value&key=value. A scorer can act as judge.")
    reward_weights: list[float] = option([], "One weight each, after normalisation; empty means 1.")
    pairing: Literal["round_robin", "opponents", "tournament"] = option(
        "round_robin", "All pairs of a group, a random pairing with `opponents` each, or a tournament of log2 G rounds."
    )
    opponents: int | None = option(None, "How many others each picture meets with pairing=opponents.")
    both_orders: bool = option(True, "Ask each pair in both orders; a judge that does so itself needs false.")
    tie_margin: float = option(0.0, "Scores that differ by no more than this are a tie.")
    advantage_scale: Literal["default", "group", "fixed", "none"] = option(
        "default", "What advantages are divided by; `default`: fixed for win rates, the group's spread for scores."
    )
    advantage_clip: float = option(5.0, "Largest advantage.")
    min_spread: float = option(1e-6, "Groups whose rewards differ by less have no advantage.")
    reward_timeout: float = option(600.0, "Seconds to wait for rewards once all is drawn; late ones are missing.")
    judge_patience: float = option(
        300.0, "Seconds to wait for a reward model that answers nothing, before training is paused."
    )

    # Objective
    clip_range: float = option(1e-4, "Trust region of the ratio, 1 +- this; meant for log_prob=mean.")
    log_prob: Literal["mean", "sum"] = option("mean", "Log-densities per latent element, or of the whole latent.")
    ratio_norm: bool = option(False, "Unbiased log-ratios with even steps (GRPO-Guard); use a larger clip_range.")
    kl_weight: float = option(0.0, "Pull to the reference; 0 needs none.")
    kl_form: Literal["prediction", "density"] = option(
        "prediction", "Squared difference of predictions, or the exact KL of the steps' densities."
    )

    # Hold-out
    holdout_every: int | None = option(None, "Optimizer steps between scores of the hold-out; None takes none.")
    holdout_prompts: str | None = option(None, "Prompts of the hold-out: a file, or a set such as shapes:heldout.")
    holdout_count: int = option(64, "How many of them.")
    holdout_rewards: list[str] = option([], "Reward models that training does not see, scored on the hold-out too.")

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        """Only the pull to it needs one."""
        return self.kl_weight > 0
