"""Settings from YAML and ``key=value``: read, checked as a whole, explained and written back.

A job is one flat mapping: what to train on what (:class:`Job`) and how (the method's config dataclass). Nothing is
ignored: an unknown key, a wrong type, a value out of range and a setting without effect are each a ``ConfigError``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from .config_rules import check
from .config_values import as_yaml, default_of, fields_of, listed, members, nearest, type_name, typed
from .errors import ConfigError
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
    raise ConfigError(f"{path_or_name} {what}.{nearest(str(path_or_name), known)} Recipes: {', '.join(known)}.")


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
    if kind is not None and str in members(kind) and not text.startswith(("'", '"')):
        is_null = type(None) in members(kind) and re.fullmatch(SCALARS["null"], text)
        return None if is_null else text
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not readable YAML: {' '.join(str(error).split())}") from error


def _build(values: Mapping[str, tuple[Any, str]], source: str) -> tuple[Job, TrainingConfig]:
    method = values.get("method", ("dpo", ""))[0]
    if method not in METHODS:
        raise ConfigError(
            f"{source}: there is no method {method!r}.{nearest(str(method), METHODS)} Known: {listed(METHODS)}."
        )
    config_class = load_object(METHODS[method].config)
    job_fields, config_fields = fields_of(Job), fields_of(config_class)
    known = job_fields | config_fields
    for key, (_, origin) in values.items():
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {key!r} for method {method}.{_hint(key, known)}")
    if values.get("dataset", (None, ""))[0] is None:
        raise ConfigError(f"{source}: dataset is missing. Give dataset=FOLDER or a hub id; see docs/data-format.md.")
    job_kinds, kinds = typing.get_type_hints(Job), typing.get_type_hints(config_class)
    job = {k: typed(k, v, job_kinds[k], origin) for k, (v, origin) in values.items() if k in job_fields}
    settings = {k: typed(k, v, kinds[k], origin) for k, (v, origin) in values.items() if k in config_fields}
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


def _all_kinds() -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for method in METHODS.values():
        kinds |= typing.get_type_hints(load_object(method.config))
    return kinds | typing.get_type_hints(Job)


def _hint(key: str, known: Iterable[str]) -> str:
    owners = [name for name, method in METHODS.items() if key in fields_of(load_object(method.config))]
    if owners:
        return f" It belongs to method {listed(owners)}."
    return nearest(key, known) + " `diffalign train --help` lists all keys."


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
    return {name for base in _config_bases(cls) for name in fields_of(base)}


def _describe(cls: type, skip: set[str]) -> str:
    kinds, headings = typing.get_type_hints(cls), _headings(cls)
    lines: list[str] = []
    for name, setting in fields_of(cls).items():
        if name in skip:
            continue
        if name in headings:
            lines += [""] * bool(lines) + [headings[name]]
        default = "required" if default_of(setting) is MISSING else f"default {as_yaml(default_of(setting))}"
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


def dump(job: Job, config: TrainingConfig) -> str:
    """The resolved job as YAML that :func:`load_job` reads back to the same."""
    return yaml.dump(asdict(job) | asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
