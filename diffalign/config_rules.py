"""What settings may be: ranges, combinations, and settings that would have no effect."""

from __future__ import annotations

import math
import typing
from importlib.util import find_spec
from typing import Any

from .config_values import as_yaml, default_of, fields_of, listed, nearest, typed
from .errors import ConfigError
from .trainers.config import DPOConfig, NoiseLevelConfig, PreferenceConfig, PrefGRPOConfig, TrainingConfig

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
TRACKERS = ("tensorboard", "wandb", "trackio")

# Each range as (lowest, highest, whether the lowest itself is allowed); checked on every element of a list.
_COUNT, _POSITIVE, _NOT_NEGATIVE, _SHARE = (1, math.inf, True), (0, math.inf, False), (0, math.inf, True), (0, 1, True)
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("max_steps", "batch_size", "gradient_accumulation_steps", "lora_rank", "resolution"), _COUNT),
    **dict.fromkeys(("encode_batch_size", "save_every", "keep_checkpoints", "log_every"), _COUNT),
    **dict.fromkeys(("validate_every", "validation_steps"), _COUNT),
    **dict.fromkeys(("max_epochs", "learning_rate", "adam_epsilon", "max_grad_norm", "lora_alpha", "beta"), _POSITIVE),
    **dict.fromkeys(("seed", "warmup_steps", "weight_decay", "min_timestep", "max_timestep"), _NOT_NEGATIVE),
    **dict.fromkeys(("timesteps", "validation_guidance"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout", "ema_decay"), _SHARE),
    **dict.fromkeys(("min_margin", "caption_dropout", "label_smoothing"), _SHARE),
    **dict.fromkeys(("images_per_pass", "precompute_reference", "draws_per_row", "max_prompt_tokens"), _COUNT),
    **dict.fromkeys(("matching_draws", "inversion_buckets"), _COUNT),
    **dict.fromkeys(("density_std", "gamma", "kappa", "margin_scale", "exponent", "log_base"), _POSITIVE),
    **dict.fromkeys(("sft_weight", "margin_weight", "inversion_steps", "renoise", "guidance_embedding"), _NOT_NEGATIVE),
    **dict.fromkeys(("curriculum_stages", "list_size", "group_size"), (2, math.inf, True)),
    **dict.fromkeys(("prompts_per_rollout", "updates_per_rollout", "sampling_steps", "sde_window"), _COUNT),
    **dict.fromkeys(("sde_window_stay", "opponents", "holdout_every", "holdout_count"), _COUNT),
    **dict.fromkeys(("guidance_scale", "final_steps", "tie_margin", "kl_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("min_spread", "judge_patience"), _NOT_NEGATIVE),
    **dict.fromkeys(("advantage_clip", "reward_timeout", "clip_range", "noise_level"), _POSITIVE),
    "timestep_fraction": (0, 1, False),
    **dict.fromkeys(("truncation_steps",), _COUNT),
    **dict.fromkeys(("huber_c", "target_gradient_factor"), _POSITIVE),
    **dict.fromkeys(("negative_share", "teacher_decay"), _SHARE),
}
BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout", "ema_decay", "caption_dropout", "teacher_decay")
BELOW_HALF = ("label_smoothing", "target_gradient_factor")
#: What only one of the objectives of online training reads.
MATCHING = [
    "min_timestep",
    "max_timestep",
    "timesteps",
    "timestep_density",
    "density_mean",
    "density_std",
    "loss_space",
]
SAMPLING = [
    *("sampler", "noise_level", "guidance_gradient", "latent_dtype", "final_steps", "sde_window", "sde_window_moves"),
    *("sde_window_stay", "timestep_fraction", "log_prob", "ratio_norm", "kl_form"),
]


def check(config: TrainingConfig) -> None:
    """Refuse settings of a wrong type, out of range, contradicting each other, or without effect.

    Raises:
        ConfigError: the first problem, by name, with what to do.
    """
    kinds = typing.get_type_hints(type(config))
    for name, kind in kinds.items():
        if name in fields_of(type(config)):
            value = typed(name, vars(config)[name], kind)
            _check_range(name, value)
    _check_combinations(config)
    _check_idle(config)


def _check_range(name: str, value: Any) -> None:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            continue
        low, high, inclusive = RANGES.get(name, (-math.inf, math.inf, True))
        high = 0.5 if name in BELOW_HALF else high
        open_above = name in BELOW_ONE + BELOW_HALF
        top = item < high if open_above else item <= high
        if not (math.isfinite(item) and (item >= low if inclusive else item > low) and top):
            lower = f"at least {low}" if inclusive else f"above {low}"
            upper = "" if high == math.inf else f" and {'below' if open_above else 'at most'} {high}"
            raise ConfigError(f"{name} must be a finite number {lower}{upper}; got {item}.")


def _check_combinations(config: TrainingConfig) -> None:
    c, require = config, _require
    for name in ("output_dir", "resume", "project_name"):
        require(bool(vars(c)[name].strip()), f"{name} must not be empty.")
    require(
        (c.max_steps is None) != (c.max_epochs is None),
        f"give either max_steps or max_epochs, and null for the other; got max_steps={as_yaml(c.max_steps)} and "
        f"max_epochs={as_yaml(c.max_epochs)}.",
    )
    require(c.lr_schedule in SCHEDULES, f"lr_schedule must be one of {listed(SCHEDULES)}; got {c.lr_schedule!r}.")
    for name in c.trackers:
        require(name in TRACKERS, f"there is no tracker {name!r}.{nearest(name, TRACKERS)} Known: {listed(TRACKERS)}.")
    require(len(set(c.trackers)) == len(c.trackers), f"a tracker is named twice in trackers={c.trackers}.")
    require(
        c.validate_every is None or bool(c.validation_prompts),
        f"validate_every={c.validate_every} needs validation_prompts; give a list of prompts, or validate_every=null.",
    )
    # Autocast casts to mixed_precision alone, and leaves some layers in the precision of their weights.
    require(
        c.adapter != "none" or c.reference_dtype in ("same", c.mixed_precision),
        f"reference_dtype={c.reference_dtype} needs mixed_precision={c.reference_dtype}, not {c.mixed_precision}: "
        "make them equal, or set reference_dtype=same.",
    )
    if isinstance(c, NoiseLevelConfig):
        require(
            c.max_timestep is None or c.min_timestep <= c.max_timestep,
            f"min_timestep={c.min_timestep} must not be above max_timestep={c.max_timestep}.",
        )
    if isinstance(c, PreferenceConfig):
        _check_preference_combinations(c)
    if isinstance(c, DPOConfig):
        _check_dpo_combinations(c)
    if isinstance(c, PrefGRPOConfig):
        _check_grpo_combinations(c)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_preference_combinations(c: PreferenceConfig) -> None:
    _require(
        c.ties == "drop" or c.min_margin == 0,
        f"ties=soft keeps ties, min_margin={c.min_margin} drops them: choose min_margin=0 or ties=drop.",
    )
    _require(
        c.images_per_pass is None or c.lora_dropout == 0,
        f"images_per_pass={c.images_per_pass} runs each image twice, and lora_dropout={c.lora_dropout} would differ "
        "between the two: set lora_dropout=0.",
    )
    _require(
        c.precompute_reference is None or c.has_reference,
        f"precompute_reference={c.precompute_reference}, but this method compares with no reference model: leave it "
        "out.",
    )
    _require(
        c.precompute_reference is None or c.draws_per_row in (None, c.precompute_reference),
        f"precompute_reference={c.precompute_reference} is a number of draws per row too: leave draws_per_row out.",
    )
    inverter = getattr(c, "inverter", None)
    _require(
        c.precompute_reference is None or inverter != "policy",
        f"precompute_reference={c.precompute_reference} needs noise that stays the same, but with inverter=policy it "
        "moves with the policy: use inverter=reference.",
    )
    buckets = getattr(c, "inversion_buckets", None)
    _require(
        buckets is None or not c.sample_latents,
        f"inversion_buckets={buckets} would find no inversion again: with sample_latents=true each visit inverts other "
        "latents of the image. Set sample_latents=false.",
    )
    score_range = getattr(c, "score_range", [])
    _require(
        not score_range or (len(score_range) == 2 and score_range[0] < score_range[1]),
        f"score_range must be [lowest, highest]; got {score_range}.",
    )


def _check_dpo_combinations(c: DPOConfig) -> None:
    target = c.target_gradient_factor
    if target is None:
        return
    _require(
        c.loss_type == "sigmoid",
        f"target_gradient_factor={target} needs loss_type=sigmoid: with loss_type={c.loss_type} a learnt pair stays at "
        "one logit whatever beta is, so that beta would run to a bound. Leave it out.",
    )
    _require(
        c.smoothing == "robust" or target > c.label_smoothing,
        f"target_gradient_factor={target} must be above label_smoothing={c.label_smoothing}, the factor at which "
        "smoothing=conservative holds a learnt pair: beta would run to a bound. Raise the target.",
    )


def _check_grpo_combinations(c: PrefGRPOConfig) -> None:
    _require(
        c.objective == "sampling" or not c.shared_noise,
        "shared_noise=true with objective=matching would draw one picture group_size times: its rollouts have no other "
        "randomness. Leave it out.",
    )
    _require(
        c.gradient_accumulation_steps == 1,
        f"gradient_accumulation_steps={c.gradient_accumulation_steps} has no effect: the pictures of an update are run "
        "in parts of batch_size. Choose prompts_per_rollout, group_size and updates_per_rollout.",
    )
    _require(
        c.lora_dropout == 0,
        f"lora_dropout={c.lora_dropout} would make the replay of a picture differ from its drawing: set it to 0.",
    )
    _require(
        (c.pairing == "opponents") == (c.opponents is not None),
        f"pairing={c.pairing} with opponents={as_yaml(c.opponents)}: opponents belongs to pairing=opponents and to no "
        "other.",
    )
    _require(
        c.opponents is None or (c.opponents < c.group_size and c.opponents * c.group_size % 2 == 0),
        f"opponents={as_yaml(c.opponents)} in groups of {c.group_size} is impossible: each picture has "
        f"{c.group_size - 1} others to meet, and opponents x group_size must be even.",
    )
    _require(
        not c.reward_weights or not c.rewards or len(c.reward_weights) == len(c.rewards),
        f"reward_weights must have one weight for each of rewards; got {len(c.reward_weights)} for {len(c.rewards)}.",
    )
    _require(
        (c.holdout_every is None) == (c.holdout_prompts is None),
        f"holdout_every={as_yaml(c.holdout_every)} and holdout_prompts={as_yaml(c.holdout_prompts)} need each other.",
    )


def _check_idle(config: TrainingConfig) -> None:
    """Refuse a setting that was changed from its default although another one keeps it from being read."""
    c, own = config, vars(config)
    rules: list[tuple[bool, str, list[str]]] = [
        (c.adapter == "none", "adapter=none", ["lora_rank", "lora_alpha", "lora_dropout", "lora_targets"]),
        (c.adapter != "none", f"adapter={c.adapter} (its reference is the base itself)", ["reference_dtype"]),
        (not c.has_reference, "a method without a reference", ["reference_dtype", "ties"]),
        (own.get("precompute_reference") is not None, "precompute_reference (nothing is copied)", ["reference_dtype"]),
        (not getattr(c, "takes_pairs", True), "a method on lists", ["pairs", "ties"]),
        (
            own.get("timestep_density") not in (None, "default", "logit_normal"),
            "this timestep_density",
            ["density_mean", "density_std"],
        ),
        (not own.get("label_smoothing"), "label_smoothing=0", ["smoothing"]),
        (own.get("variant") == "paper", "variant=paper", ["margin_weight", "kappa", "margin_scale"]),
        (own.get("variant") == "code", "variant=code", ["exponent"]),
        ("gamma" in own and own["score"] is None, "score=null", ["score_range", "contradiction"]),
        (own.get("inversion_steps") == 0, "inversion_steps=0", ["renoise", "inverter", "inversion_buckets"]),
        (own.get("inverter") == "policy", "inverter=policy (nothing is cached)", ["inversion_buckets"]),
        (own.get("teacher") == "frozen", "teacher=frozen", ["teacher_decay"]),
        (own.get("teacher") == "ema", "teacher=ema (nothing is copied)", ["reference_dtype"]),
        (own.get("loss") == "mse", "loss=mse", ["huber_c"]),
        (own.get("weighting") == "none", "weighting=none", ["gain", "log_base", "rank_source"]),
        (own.get("weighting") == "gain", "weighting=gain", ["log_base", "rank_source"]),
        (c.optimizer == "adafactor", "optimizer=adafactor", ["adam_beta1", "adam_beta2", "adam_epsilon"]),
        (c.lr_schedule == "constant", "lr_schedule=constant (use constant_with_warmup)", ["warmup_steps"]),
        (bool(own.get("timesteps")), "a list of timesteps", ["min_timestep", "max_timestep", "inversion_buckets"]),
        (c.validate_every is None, "validate_every=null", ["validation_prompts"]),
        (own.get("objective") == "sampling", "objective=sampling", ["matching_draws", *MATCHING]),
        (own.get("objective") == "matching", "objective=matching", SAMPLING),
        (own.get("reward") == "score", "reward=score", ["pairing", "opponents", "both_orders", "tie_margin"]),
        (own.get("kl_weight") == 0, "kl_weight=0", ["kl_form", "reference_dtype"]),
        (own.get("guidance_scale", 2) <= 1, "guidance_scale of 1 or less", ["guidance_gradient"]),
        ("sde_window" in own and own["sde_window"] is None, "sde_window=null", ["sde_window_moves", "sde_window_stay"]),
        (own.get("sde_window_moves") == "random", "sde_window_moves=random", ["sde_window_stay"]),
        ("holdout_every" in own and own["holdout_every"] is None, "holdout_every=null", ["holdout_rewards"]),
        (not c.push_to_hub, "push_to_hub=false", ["hub_model_id", "hub_private"]),
    ]
    settings = fields_of(type(c))
    for applies, reason, names in rules:
        for name in names:
            if name not in settings:
                continue
            default = default_of(settings[name])
            if applies and vars(c)[name] != default:
                raise ConfigError(
                    f"{name}={as_yaml(vars(c)[name])} has no effect with {reason}: leave it out, or set "
                    f"{name}={as_yaml(default)}, its default."
                )


def check_installed(config: TrainingConfig) -> None:
    """Refuse settings that need a package which is not installed, before any model is loaded.

    Raises:
        ConfigError: names the setting, the package and the command that installs it.
    """
    needed = [(f"trackers={name}", name, name) for name in config.trackers]
    needed += [("optimizer=adamw_8bit", "bitsandbytes", "bnb")] * (config.optimizer == "adamw_8bit")
    needed += [("attention=xformers", "xformers", "xformers")] * (config.attention == "xformers")
    for setting, package, extra in needed:
        if find_spec(package) is None:
            raise ConfigError(
                f"{setting} needs {package}: run `pip install 'diffalign[{extra}]'`, or change the setting."
            )
