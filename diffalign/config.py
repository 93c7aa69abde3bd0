"""Settings from YAML and ``key=value``: read, checked as a whole, explained and written back.

A job is one flat mapping: what to train on what (:class:`Job`) and how (the method's config dataclass). Nothing is
ignored: an unknown key, a wrong type, a value out of range and a setting without effect are each a ``ConfigError``.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import ConfigError
from .trainers.config import PreferenceConfig, PrefGRPOConfig
from .yaml_dialect import SCALARS, Dumper, Loader

if TYPE_CHECKING:
    from .trainers.config import TrainingConfig
    from .trainers.loop import TrainingLoop


@dataclass(frozen=True)
class Method:
    """Where a method's classes are, as ``module:name``, so that listing methods imports none of them."""

    trainer: str
    config: str


METHODS = {
    "dpo": Method("diffalign.trainers.dpo:DPOTrainer", "diffalign.trainers.config:DPOConfig"),
    "mapo": Method("diffalign.trainers.mapo:MaPOTrainer", "diffalign.trainers.config:MaPOConfig"),
    "smpo": Method("diffalign.trainers.smpo:SmPOTrainer", "diffalign.trainers.config:SmPOConfig"),
    "rankdpo": Method("diffalign.trainers.rankdpo:RankDPOTrainer", "diffalign.trainers.config:RankDPOConfig"),
    "sft": Method("diffalign.trainers.sft:SFTTrainer", "diffalign.trainers.config:SFTConfig"),
    "prefgrpo": Method("diffalign.trainers.grpo.trainer:PrefGRPOTrainer", "diffalign.trainers.config:PrefGRPOConfig"),
    "selfnpo": Method("diffalign.trainers.selfnpo:SelfNPOTrainer", "diffalign.trainers.config:SelfNPOConfig"),
}


@dataclass(kw_only=True)
class Job:
    """What to train, on what, by which method."""

    # What to train on what
    method: str = field(default="dpo", metadata={"help": "Which objective: one of the methods below."})
    model: str = field(
        default="shapes", metadata={"help": "`shapes` (the embedded micro SDXL), a hub id, a folder or a file."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the hub."})
    model_variant: str | None = field(default=None, metadata={"help": "Variant of its weight files, for example fp16."})
    model_config: str | None = field(
        default=None, metadata={"help": "For a single-file model, a folder or hub id of a pipeline of the same kind."}
    )
    dataset: str = field(metadata={"help": "Preferences: a folder of Parquet, an image folder with a table, a hub id."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub dataset."})
    dataset_score: str | None = field(
        default=None, metadata={"help": "Judge by this reward model's scores in the table, not by its preferences."}
    )
    bad_rows: Literal["error", "drop"] = field(
        default="error", metadata={"help": "What a row that cannot be used does: stop, or be dropped and counted."}
    )


# --- reading -----------------------------------------------------------------------------------------------------


def load_job(path_or_name: str | Path, overrides: Iterable[str] = ()) -> tuple[Job, TrainingConfig]:
    """Read a job from a YAML file (or a shipped recipe's name) and ``key=value`` overrides, and check it.

    Args:
        path_or_name: a path, or the bare name of a recipe, for example ``shapes-dpo``.
        overrides: ``key=value`` each, the value written as in YAML; text needs no quotes.

    Raises:
        ConfigError: no such file or recipe, or anything in it that cannot be used, by key.
    """
    path = find_config(path_or_name)
    values = {key: (value, str(path)) for key, value in _read_yaml(path).items()}
    kinds = _all_kinds()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"expected key=value, got {override!r}. Write for example learning_rate=1e-5.")
        key = key.strip()
        values[key] = (_read_value(text.strip(), kinds.get(key), override), f"override {override!r}")
    return _build(values, str(path))


def find_config(path_or_name: str | Path) -> Path:
    """The file a CONFIG argument means.

    Raises:
        ConfigError: neither a file nor a recipe; names the recipes and the nearest.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = recipes()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    what = "is a folder, not a YAML file" if path.is_dir() else "is neither a file nor a recipe"
    raise ConfigError(f"{path_or_name} {what}.{_nearest(str(path_or_name), known)} Recipes: {', '.join(known)}.")


def recipes() -> dict[str, Path]:
    """The shipped recipes by name: of the clone this runs from, else of the installed package."""
    here = Path(__file__).parent
    folders = [here.parent / "training" / "recipes", here / "recipes"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # The loader is a SafeLoader: it makes plain values only.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


def _read_value(text: str, kind: Any, override: str) -> Any:
    """An override's value. Where the key holds text it is taken as it stands: `1e5` or `a #b` may be a real name."""
    if kind is not None and str in _members(kind) and not text.startswith(("'", '"')):
        is_null = type(None) in _members(kind) and re.fullmatch(SCALARS["null"], text)
        return None if is_null else text
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not readable YAML: {' '.join(str(error).split())}") from error


def _build(values: Mapping[str, tuple[Any, str]], source: str) -> tuple[Job, TrainingConfig]:
    method = values.get("method", ("dpo", ""))[0]
    if method not in METHODS:
        raise ConfigError(
            f"{source}: there is no method {method!r}.{_nearest(str(method), METHODS)} Known: {_or(METHODS)}."
        )
    config_class = load_object(METHODS[method].config)
    job_fields, config_fields = _fields(Job), _fields(config_class)
    known = job_fields | config_fields
    for key, (_, origin) in values.items():
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {key!r} for method {method}.{_hint(key, known)}")
    if values.get("dataset", (None, ""))[0] is None:
        raise ConfigError(f"{source}: dataset is missing. Give dataset=FOLDER or a hub id; see docs/data-format.md.")
    job_kinds, kinds = typing.get_type_hints(Job), typing.get_type_hints(config_class)
    job = {k: _typed(k, v, job_kinds[k], origin) for k, (v, origin) in values.items() if k in job_fields}
    settings = {k: _typed(k, v, kinds[k], origin) for k, (v, origin) in values.items() if k in config_fields}
    config = config_class(**settings)
    check(config)
    made = Job(**job)
    for name in ("model", "dataset"):
        if not vars(made)[name].strip():
            raise ConfigError(f"{source}: {name} must not be empty.")
    return made, config


def load_object(path: str) -> Any:
    """The object at ``module:name``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def trainer_class(method: str) -> type[TrainingLoop]:
    """The trainer of a method, imported now."""
    return load_object(METHODS[method].trainer)


# --- types -------------------------------------------------------------------------------------------------------


def _members(kind: Any) -> tuple[Any, ...]:
    """``int | None`` as (int, None); any other type as itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def type_name(kind: Any) -> str:
    """A type in words a user knows."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    names = []
    for member in _members(kind):
        if typing.get_origin(member) is typing.Literal:
            names.append("one of " + ", ".join(str(value) for value in typing.get_args(member)))
        elif typing.get_origin(member) is list:
            item = {int: "whole numbers", float: "numbers", str: "texts"}[typing.get_args(member)[0]]
            names.append(f"a list of {item}")
        else:
            names.append(words[member])
    return " or ".join(names)


def _typed(key: str, value: Any, kind: Any, origin: str = "") -> Any:
    """The value in its declared type; whole numbers may stand for numbers, nothing else is converted."""
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        place = "".join(f"[{i}]" for i in error.errors()[0]["loc"] if isinstance(i, int))
        where = f"{origin}: " if origin else ""
        example = " Write a list as [a, b]." if typing.get_origin(kind) is list and not isinstance(value, list) else ""
        raise ConfigError(
            f"{where}{key}{place} must be {type_name(kind)}; got {value!r} ({type(value).__name__}).{example}"
        ) from error


def _fields(cls: type) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls)}


def _all_kinds() -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for method in METHODS.values():
        kinds |= typing.get_type_hints(load_object(method.config))
    return kinds | typing.get_type_hints(Job)


def _hint(key: str, known: Iterable[str]) -> str:
    owners = [name for name, method in METHODS.items() if key in _fields(load_object(method.config))]
    if owners:
        return f" It belongs to method {_or(owners)}."
    return _nearest(key, known) + " `diffalign train --help` lists all keys."


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _or(names: Iterable[str]) -> str:
    return ", ".join(names)


# --- rules -------------------------------------------------------------------------------------------------------

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
    **dict.fromkeys(("min_margin", "caption_dropout", "label_smoothing", "target_gradient_factor"), _SHARE),
    **dict.fromkeys(("images_per_pass", "precompute_reference", "draws_per_row", "max_prompt_tokens"), _COUNT),
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
    **dict.fromkeys(("huber_c",), _POSITIVE),
    **dict.fromkeys(("negative_share", "teacher_decay"), _SHARE),
}
BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout", "ema_decay", "caption_dropout", "teacher_decay")
BELOW_HALF = ("label_smoothing", "target_gradient_factor")


def check(config: TrainingConfig) -> None:
    """Refuse settings of a wrong type, out of range, contradicting each other, or without effect.

    Raises:
        ConfigError: the first problem, by name, with what to do.
    """
    kinds = typing.get_type_hints(type(config))
    for name, kind in kinds.items():
        if name in _fields(type(config)):
            value = _typed(name, vars(config)[name], kind)
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
        f"give either max_steps or max_epochs, and null for the other; got max_steps={_yaml(c.max_steps)} and "
        f"max_epochs={_yaml(c.max_epochs)}.",
    )
    require(c.lr_schedule in SCHEDULES, f"lr_schedule must be one of {_or(SCHEDULES)}; got {c.lr_schedule!r}.")
    for name in c.trackers:
        require(name in TRACKERS, f"there is no tracker {name!r}.{_nearest(name, TRACKERS)} Known: {_or(TRACKERS)}.")
    require(len(set(c.trackers)) == len(c.trackers), f"a tracker is named twice in trackers={c.trackers}.")
    require(
        c.validate_every is None or bool(c.validation_prompts),
        f"validate_every={c.validate_every} needs validation_prompts; give a list of prompts, or validate_every=null.",
    )
    require(
        c.adapter != "none" or c.reference_dtype == "same" or c.mixed_precision != "no",
        f"reference_dtype={c.reference_dtype} needs autocast: set mixed_precision, or reference_dtype=same.",
    )
    if isinstance(c, PreferenceConfig):
        _check_preference_combinations(c)
    if isinstance(c, PrefGRPOConfig):
        _check_grpo_combinations(c)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_preference_combinations(c: PreferenceConfig) -> None:
    _require(
        c.max_timestep is None or c.min_timestep <= c.max_timestep,
        f"min_timestep={c.min_timestep} must not be above max_timestep={c.max_timestep}.",
    )
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
        c.precompute_reference is None or c.draws_per_row in (None, c.precompute_reference),
        f"precompute_reference={c.precompute_reference} is a number of draws per row too: leave draws_per_row out.",
    )
    _require(
        c.precompute_reference is None or c.has_reference,
        f"precompute_reference={c.precompute_reference}, but this method compares with no reference model: leave it "
        "out.",
    )
    inverter = getattr(c, "inverter", None)
    _require(
        c.precompute_reference is None or inverter != "policy",
        f"precompute_reference={c.precompute_reference} needs noise that stays the same, but with inverter=policy it "
        "moves with the policy: use inverter=reference.",
    )
    score_range = getattr(c, "score_range", [])
    _require(
        not score_range or (len(score_range) == 2 and score_range[0] < score_range[1]),
        f"score_range must be [lowest, highest]; got {score_range}.",
    )


def _check_grpo_combinations(c: PrefGRPOConfig) -> None:
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
        f"pairing={c.pairing} with opponents={_yaml(c.opponents)}: opponents belongs to pairing=opponents and to no "
        "other.",
    )
    _require(
        not c.reward_weights or not c.rewards or len(c.reward_weights) == len(c.rewards),
        f"reward_weights must have one weight for each of rewards; got {len(c.reward_weights)} for {len(c.rewards)}.",
    )
    _require(
        (c.holdout_every is None) == (c.holdout_prompts is None),
        f"holdout_every={_yaml(c.holdout_every)} and holdout_prompts={_yaml(c.holdout_prompts)} need each other.",
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
        (own.get("inversion_steps") == 0, "inversion_steps=0", ["renoise", "inverter"]),
        (own.get("teacher") == "frozen", "teacher=frozen", ["teacher_decay"]),
        (own.get("teacher") == "ema", "teacher=ema (nothing is copied)", ["reference_dtype"]),
        (own.get("loss") == "mse", "loss=mse", ["huber_c"]),
        (own.get("weighting") == "none", "weighting=none", ["gain", "log_base", "rank_source"]),
        (own.get("weighting") == "gain", "weighting=gain", ["log_base", "rank_source"]),
        (c.optimizer == "adafactor", "optimizer=adafactor", ["adam_beta1", "adam_beta2", "adam_epsilon"]),
        (c.lr_schedule == "constant", "lr_schedule=constant (use constant_with_warmup)", ["warmup_steps"]),
        (bool(own.get("timesteps")), "a list of timesteps", ["min_timestep", "max_timestep"]),
        (c.validate_every is None, "validate_every=null", ["validation_prompts"]),
        (own.get("reward") == "score", "reward=score", ["pairing", "opponents", "both_orders", "tie_margin"]),
        (own.get("kl_weight") == 0, "kl_weight=0", ["kl_form", "reference_dtype"]),
        (own.get("guidance_scale", 2) <= 1, "guidance_scale of 1 or less", ["guidance_gradient"]),
        ("sde_window" in own and own["sde_window"] is None, "sde_window=null", ["sde_window_moves", "sde_window_stay"]),
        (own.get("sde_window_moves") == "random", "sde_window_moves=random", ["sde_window_stay"]),
        ("holdout_every" in own and own["holdout_every"] is None, "holdout_every=null", ["holdout_rewards"]),
        (not c.push_to_hub, "push_to_hub=false", ["hub_model_id", "hub_private"]),
    ]
    settings = _fields(type(c))
    for applies, reason, names in rules:
        for name in names:
            if name not in settings:
                continue
            default = _default(settings[name])
            if applies and vars(c)[name] != default:
                raise ConfigError(
                    f"{name}={_yaml(vars(c)[name])} has no effect with {reason}: leave it out, or set "
                    f"{name}={_yaml(default)}, its default."
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


# --- explaining and writing --------------------------------------------------------------------------------------


def describe() -> str:
    """Every key with type, default and meaning, under the headings of the dataclasses' own comments."""
    blocks = [_describe(Job, set())]
    classes = {name: load_object(method.config) for name, method in METHODS.items()}
    bases = dict.fromkeys(base for cls in classes.values() for base in _config_bases(cls))
    for base in sorted(bases, key=lambda base: len(base.__mro__)):
        users = [name for name, cls in classes.items() if issubclass(cls, base)]
        title = "" if len(users) == len(classes) else f"Shared by {', '.join(users)}\n\n"
        blocks.append(title + _describe(base, _inherited(base)))
    for name, cls in classes.items():
        summary = (inspect.getdoc(cls) or "").splitlines()[0].rstrip(".")
        own = _describe(cls, _inherited(cls))
        blocks.append(f"Method {name}: {summary}\n" + (own or "  (no keys of its own)\n"))
    return "\n".join(blocks)


def _config_bases(cls: type) -> list[type]:
    """The dataclasses that a settings class inherits from."""
    return [base for base in cls.__mro__[1:] if is_dataclass(base)]


def _inherited(cls: type) -> set[str]:
    return {name for base in _config_bases(cls) for name in _fields(base)}


def _describe(cls: type, skip: set[str]) -> str:
    kinds, headings = typing.get_type_hints(cls), _headings(cls)
    lines: list[str] = []
    for name, setting in _fields(cls).items():
        if name in skip:
            continue
        if name in headings:
            lines += [""] * bool(lines) + [headings[name]]
        default = "required" if _default(setting) is MISSING else f"default {_yaml(_default(setting))}"
        lines += [f"  {name}: {type_name(kinds[name])}; {default}", f"      {setting.metadata['help']}"]
    return "\n".join(lines) + "\n" if lines else ""


def _headings(cls: type) -> dict[str, str]:
    """The comment line that stands above a field, by field name."""
    lines = inspect.getsource(cls).splitlines()
    body = ast.parse("\n".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = lines[node.lineno - 2].strip()
            if above.startswith("# "):
                found[node.target.id] = above[2:]
    return found


def _default(setting: Field[Any]) -> Any:
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def dump(job: Job, config: TrainingConfig) -> str:
    """The resolved job as YAML that :func:`load_job` reads back to the same."""
    return yaml.dump(asdict(job) | asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
