"""Finding a reward model by name, dotted path or callable."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, cast

import torch
import yaml

from .base import FunctionRewardModel
from .errors import RewardModelError
from .keys import KEY_ADVICE
from .protocol import PairwiseRewardModel, RewardModel

ENTRY_POINT_GROUP = "reward_models"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BUILT_IN = {
    "aesthetic": "reward_models.aesthetic:AestheticScore",
    "clip": "reward_models.clip:ClipScore",
    "ensemble": "reward_models.ensemble:Ensemble",
    "hpsv2": "reward_models.hpsv2:HPSv2",
    "hpsv3": "reward_models.hpsv3:HPSv3",
    "imagereward": "reward_models.imagereward:ImageReward",
    "mps": "reward_models.mps:MPS",
    "pickscore": "reward_models.pickscore:PickScore",
    "unified-reward": "reward_models.unified_reward:UnifiedReward",
    "vqascore": "reward_models.vqascore:VQAScore",
}


def load_reward_model(
    name_or_path: str | RewardModel | Callable[..., Any],
    *,
    device: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
    **options: Any,
) -> RewardModel:
    """Load a scorer.

    Args:
        name_or_path: a name (:func:`available_reward_models`), a dotted path ``package.module:Class`` or
            ``package.module:function``, each with options behind it as ``name?option=value&option=value`` (values as in
            YAML; ``dtype`` is fp32, fp16 or bf16); a class, a scoring function ``f(images, prompts) -> scores``, or a
            ready model, which comes back as it is.
        device: where a model with weights runs, unless its name says so (``clip?device=cuda:1``). Models that have none
            run on the CPU whatever is asked.
        dtype: precision of the weights; refused by models that have none.
        revision: revision of weights from the hub; refused by models that have none.
        options: the model's own options.

    Raises:
        RewardModelError: no such name (the nearest and all available ones are listed), an option the model lacks or
            cannot do without, or a package it requires is not installed.
    """
    if isinstance(name_or_path, str):
        name_or_path, written = split_options(name_or_path)
        options = written | options
    target = _find(name_or_path) if isinstance(name_or_path, str) else name_or_path
    label = name_or_path if isinstance(name_or_path, str) else getattr(target, "__name__", type(target).__name__)
    options |= {key: value for key, value in (("dtype", dtype), ("revision", revision)) if value is not None}
    if inspect.isclass(target):
        accepted, needed = _parameters(target)
        if device is not None and "device" in accepted:
            options.setdefault("device", device)  # one that is written behind the name is meant for this model
        _refuse_unknown(label, options, accepted)
        if absent := [name for name in needed if name not in options]:
            raise RewardModelError(f"the reward model {label} needs the option {', '.join(absent)}.")
        _refuse_missing_packages(label, getattr(target, "requires", ()))
        model = target(**options)
        if not isinstance(model, (RewardModel, PairwiseRewardModel)):
            raise RewardModelError(f"{label} is no reward model: it needs name, identity and score(images, prompts).")
        return cast(RewardModel, model)
    _refuse_unknown(label, options, set())
    if isinstance(target, (RewardModel, PairwiseRewardModel)):
        return cast(RewardModel, target)
    if callable(target):
        return FunctionRewardModel(target)
    raise RewardModelError(f"{label} is neither a reward model, nor a class, nor a scoring function.")


def available_reward_models() -> dict[str, str]:
    """Every known name and the dotted path of its class: built in, or offered by an installed package."""
    offered = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return offered | _BUILT_IN


def _find(name: str) -> Any:
    if ":" in name:
        return _import(name)
    known = available_reward_models()
    if name in known:
        return _import(known[name])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RewardModelError(
        f"there is no reward model {name!r}.{hint} Available: {', '.join(sorted(known))}; "
        "or give your own as 'package.module:Class'."
    )


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RewardModelError(f"cannot import {module!r} of the reward model {path!r}: {error}") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise RewardModelError(f"{module!r} has no {attribute!r} (reward model {path!r}).") from error
    return found


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in ``name?option=value&option=value``.

    Raises:
        RewardModelError: an option without a value, a value that is no YAML, or a key of a server: such a text is kept
            in settings, model cards and reports, and published with them.
    """
    name, _, written = text.partition("?")
    options: dict[str, Any] = {}
    for part in written.split("&") if written else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise RewardModelError(f"expected name?option=value&option=value, got {text!r}.")
        if key == "api_key":
            raise RewardModelError(f"{name}: {KEY_ADVICE}")
        options[key] = _read_option(key, value)
    return name, options


def _read_option(key: str, text: str) -> Any:
    if key == "dtype":
        if text not in DTYPES:
            raise RewardModelError(f"dtype: expected {', '.join(DTYPES)}, got {text!r}.")
        return DTYPES[text]
    if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", text):  # 1e-3, which YAML 1.1 takes for text
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RewardModelError(f"{key}: {text!r} is no YAML value ({error}).") from error


def _parameters(target: type) -> tuple[set[str], list[str]]:
    """The options of a class, and those of them that have no default."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # built-in types tell no signature, and are no reward models
        return set(), []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name for p in named}, [p.name for p in named if p.default is p.empty]


def _refuse_unknown(label: str, options: dict[str, Any], accepted: set[str]) -> None:
    unknown = [key for key in options if key not in accepted]
    if unknown:
        takes = f"it takes {', '.join(sorted(accepted))}" if accepted else "it takes none"
        raise RewardModelError(f"the reward model {label} has no option {', '.join(map(repr, unknown))}; {takes}.")


def _refuse_missing_packages(label: str, packages: Iterable[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RewardModelError(
            f"the reward model {label} needs {', '.join(missing)}: install it with pip and try again."
        )
