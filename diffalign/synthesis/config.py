"""Settings of the generator, from YAML and ``key=value``: typed, checked as a whole, unknown keys refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from diffusers import schedulers
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError
from ..yaml_dialect import Dumper, Loader

RankBy = Literal["votes", "weighted_sum", "pipelines"]
NAME = r"^[A-Za-z0-9][\w.+-]*$"  # names become file names
# Options of reward models that change no score: a server may move between two starts, and its key is nobody's business.
_IDLE_OPTIONS = {"api_key", "backoff", "base_url", "batch_size", "concurrency", "device", "longest_wait", "record"}
_IDLE_OPTIONS |= {"retries", "timeout"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PipelineSpec(_Strict):
    """One way of drawing pictures."""

    name: str = Field("", description="Key of its seeds and files; the last part of `model` when empty.")
    model: str = Field("shapes", min_length=1, description="`shapes`, a hub id, a folder or a .safetensors file.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    variant: str | None = Field(None, description="Variant of the weight files, for example fp16.")
    config: str | None = Field(None, description="For a single file: folder or hub id of a pipeline of its kind.")
    lora: str | None = Field(None, description="A LoRA on top: a run's folder, a file or a hub id.")
    lora_scale: float = Field(1.0, description="Strength of the LoRA.")
    images: int = Field(1, ge=1, description="Pictures per prompt.")
    steps: int = Field(25, ge=1, description="Sampling steps.")
    guidance: float = Field(5.0, ge=0, description="Guidance scale.")
    scheduler: str | None = Field(None, description="A scheduler class of diffusers; the model's own when null.")
    height: int | None = Field(None, ge=8, description="Pixels; the model's own when null.")
    width: int | None = Field(None, ge=8, description="Pixels; the model's own when null.")
    dtype: Literal["fp32", "fp16", "bf16"] | None = Field(None, description="fp16 on a GPU, fp32 elsewhere when null.")
    batch_size: int = Field(16, ge=1, description="Pictures drawn at once: speed and memory, not content.")
    prompt: str = Field("{prompt}", description="What the model is told; {prompt} is the prompt of the row.")
    weight: float = Field(1.0, description="Order under rank_by=pipelines; higher is better, equal is a tie.")
    license: str | None = Field(None, description="Licence named on the card; read from the model's card when null.")

    @model_validator(mode="after")
    def _sensible(self) -> PipelineSpec:
        if "{prompt}" not in self.prompt:
            raise ValueError(f"prompt: expected a text with {{prompt}} in it, got {self.prompt!r}")
        if self.scheduler is not None and not hasattr(schedulers, self.scheduler):
            raise ValueError(f"scheduler: diffusers has no {self.scheduler!r}{_near(self.scheduler, dir(schedulers))}")
        return self


class RewardSpec(_Strict):
    """One scorer or judge."""

    name: str = Field("", description="Under which its scores are stored; `model` when empty.")
    model: str = Field(min_length=1, description="A name of reward_models, or package.module:Class.")
    options: dict[str, Any] = Field(default_factory=dict, description="The model's own options.")
    weight: float = Field(1.0, description="Of its votes, or of its raw scores under rank_by=weighted_sum.")
    family: str | None = Field(None, description="Models of one family (the same backbone) share one vote.")
    tie: float = Field(0.0, ge=0, description="Scores that differ by no more than this are a tie.")
    ask: Literal["scores", "pairs"] | None = Field(
        None, description="Of a model that can do both; scores when null, pairs where it gives no scores."
    )
    votes: bool = Field(True, description="false: a hold-out, which scores and has no say.")
    license: str | None = Field(None, description="Licence named on the card; read from the model's card when null.")


def _short(value: Any) -> Any:
    """``shapes`` for ``{model: shapes}``."""
    return {"model": value} if isinstance(value, str) else value


class RankingConfig(_Strict):
    """How candidates are judged."""

    reward_models: list[Annotated[RewardSpec, BeforeValidator(_short)]] = Field(
        default_factory=list, description="Who judges; a name alone is short for {model: NAME}."
    )
    rank_by: RankBy = Field(
        "votes",
        description="votes (RankDPO, Algorithm 1), weighted_sum of raw scores, or pipelines (their weights decide).",
    )
    missing: Literal["skip_model", "skip_row"] = Field(
        "skip_model", description="A model with a missing score has no say on that prompt, or the prompt is set aside."
    )
    diversity: str | None = Field(
        None, description="Reward model whose embeddings tell how far apart pictures are; thumbnails when null."
    )
    prompts_per_shard: int = Field(100, ge=1, description="The unit of work: a finished shard is final.")
    output_dir: str = Field(min_length=1, description="Folder of the table.")

    @model_validator(mode="after")
    def _voters(self) -> RankingConfig:
        names = [spec.name or spec.model for spec in self.reward_models]
        _unique("reward_models", names)
        if self.diversity is not None and self.diversity not in names:
            raise ValueError(f"diversity: {self.diversity!r} is none of reward_models{_near(self.diversity, names)}")
        voters = [spec for spec in self.reward_models if spec.votes and spec.weight]
        if self.rank_by != "pipelines" and not voters:
            raise ValueError(f"reward_models: rank_by={self.rank_by} needs at least one that votes")
        if self.rank_by == "votes" and any(spec.weight < 0 for spec in voters):
            raise ValueError("reward_models: weight: a share of the votes, at least 0")
        if self.rank_by == "weighted_sum" and any(spec.family or spec.tie for spec in voters):
            raise ValueError("reward_models: family and tie have no effect on rank_by=weighted_sum: leave them out")
        return self

    @property
    def scorers(self) -> dict[str, RewardSpec]:
        """Reward models by the name of their scores."""
        return {spec.name or spec.model: spec for spec in self.reward_models}

    def content(self) -> dict[str, Any]:
        """The settings that decide what is in the table, as plain values."""
        values = self.model_dump(exclude={"output_dir"})
        for judge in values["reward_models"]:
            del judge["license"]
            judge["options"] = {key: value for key, value in judge["options"].items() if key not in _IDLE_OPTIONS}
        return values


class GenerationConfig(RankingConfig):
    """A run of the generator."""

    prompts: str | list[str] = Field(
        description="`shapes`, a .txt, .jsonl, .csv or .parquet file, a hub id; or a list of those, read in order."
    )
    prompt_column: str = Field("prompt", description="Column of the prompts in files and data sets.")
    prompt_split: str = Field("train", description="Split of a hub data set.")
    prompt_revision: str | None = Field(None, description="Revision of a hub data set.")
    max_prompts: int | None = Field(None, ge=1, description="Stop after so many; `shapes` needs it.")
    max_prompt_characters: int = Field(2000, ge=1, description="Longer prompts are left out and listed.")
    exclude_prompts: str | None = Field(None, description="Prompts that must not be used, for example a benchmark's.")
    held_out: float = Field(0.0, ge=0, lt=1, description="Share of prompts kept for evaluation, chosen by their text.")
    seed: int = Field(0, ge=0, description="Key of the pictures' seeds.")
    pipelines: list[Annotated[PipelineSpec, BeforeValidator(_short)]] = Field(
        min_length=1, description="Who draws; a name alone is short for {model: NAME}."
    )
    image_format: Literal["png", "webp", "jpeg"] = Field("png", description="png and webp lose nothing.")
    image_quality: int | None = Field(None, ge=1, le=100, description="Of jpeg (95 when null), or of lossy webp.")
    duplicate_distance: float = Field(
        1.0, ge=0, description="Pictures of a prompt closer than this (RMS of thumbnails, 0-255) are duplicates."
    )
    load_models: Literal["together", "one_by_one"] = Field(
        "together", description="one_by_one: each model is alone in memory, pictures wait on the disk."
    )
    push_to_hub: str | None = Field(None, description="owner/name of a data set to upload the finished table to.")
    hub_private: bool = Field(True, description="Whether a repository made by the upload is private.")

    @model_validator(mode="after")
    def _whole(self) -> GenerationConfig:
        _unique("pipelines", list(self.artists))
        if sum(spec.images for spec in self.pipelines) < 2:
            raise ValueError("pipelines: a preference needs at least two images per prompt; raise `images`")
        if self.image_quality is not None and self.image_format == "png":
            raise ValueError("image_quality has no effect on png: leave it out")
        return self

    @property
    def artists(self) -> dict[str, PipelineSpec]:
        """Pipelines by name."""
        names = [spec.name or _last_part(spec.model) for spec in self.pipelines]
        _unique("pipelines", names)
        return dict(zip(names, self.pipelines, strict=True))

    def content(self) -> dict[str, Any]:
        """The settings that decide what is in the table, as plain values."""
        idle = {"load_models", "push_to_hub", "hub_private"}
        values = {key: value for key, value in super().content().items() if key not in idle}
        for pipeline in values["pipelines"]:
            del pipeline["batch_size"], pipeline["license"]
        return values


def _last_part(model: str) -> str:
    """The name of a pipeline that was given none."""
    return Path(model).name.removesuffix(".safetensors")


def _unique(where: str, names: list[str]) -> None:
    import re

    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two of them are named {name!r}; give each a `name` of its own")
        if where == "pipelines" and not re.match(NAME, name):
            raise ValueError(f"{where}: {name!r} is no name (letters, digits, . _ + -); give a `name`")


def load_generation(path: str | Path | None, overrides: Iterable[str] = ()) -> GenerationConfig:
    """Read a YAML file and ``key=value`` overrides.

    Args:
        path: the file, or the bare name of one in training/generation; None takes the overrides alone.
        overrides: ``seed=3``, ``pipelines.0.steps=30`` or ``pipelines.base.steps=30``; values as in YAML.

    Raises:
        ConfigError: no such file, an unknown key (the nearest is named), or a value that cannot be used.
    """
    values = read_yaml(find_example(path)) if path is not None else {}
    for override in overrides:
        apply_override(values, override)
    return parse(GenerationConfig, values)


def examples() -> dict[str, Path]:
    """The shipped settings by name."""
    here = Path(__file__).parents[1]
    folders = [here.parent / "training" / "generation", here / "generation"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_example(path: str | Path) -> Path:
    """The file that a CONFIG argument means."""
    if Path(path).is_file():
        return Path(path)
    known = examples()
    if str(path) not in known:
        raise ConfigError(f"{path} is neither a file nor one of {', '.join(known)}{_near(str(path), known)}.")
    return known[str(path)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return content


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``a.b.c=value`` in nested settings; items of a list go by number or by name.

    Names may hold dots: the longest one that is there wins.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or key.strip().endswith("."):
        raise ConfigError(f"expected key=value, got {override!r}. Write for example seed=1 or pipelines.0.steps=30.")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not readable YAML: {' '.join(str(error).split())}") from error
    place: Any = values
    part, rest = _first(place, key.strip())
    while rest:
        by_name = place is values and part == "pipeline_weights"  # whose keys are names too, and may be new
        if by_name:
            values.setdefault(part, {})
        place = _step(place, part, override)
        part, rest = (rest, "") if by_name else _first(place, rest)
    if isinstance(place, list):
        place[_index(place, part, override)] = value
    else:
        place[part] = value


def _first(place: Any, path: str) -> tuple[str, str]:
    """The first part of a dotted path and the rest: as much as names something at this place, else up to a dot."""
    known = {name for item in place for name in _names(item)} if isinstance(place, list) else set(place)
    ends = [i for i in range(len(path), 0, -1) if i == len(path) or path[i] == "."]
    end = next((i for i in ends if path[:i] in known), ends[-1])
    return path[:end], path[end + 1 :]


def _names(item: Any) -> list[str]:
    """What an item of a list answers to: its name, else the name that its model gives, and its model."""
    values = _short(item)
    if not isinstance(values, dict):
        return []
    model = str(values.get("model", ""))
    return [str(values["name"])] if values.get("name") else [_last_part(model), model]


def _step(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list):
        index = _index(place, part, override)
        place[index] = found = _short(place[index])
    else:
        found = place.get(part)
    if not isinstance(found, (dict, list)):
        raise ConfigError(f"{override!r}: there is no {part!r} with parts in the settings.")
    return found


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [_names(item) for item in items]
    for number, own in enumerate(names):
        if part in own:
            return number
    known = ", ".join(own[0] for own in names if own)
    raise ConfigError(f"{override!r}: expected a number below {len(items)} or one of {known}.")


def parse(kind: type[Any], values: dict[str, Any]) -> Any:
    """Checked settings of ``kind``; the first problem as one line."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function", "str", "list[")))
        if first["type"] == "extra_forbidden":
            parent, _, key = place.rpartition(".")
            raise ConfigError(f"unknown key {place!r}{_near(key, _keys(kind, parent))}.") from error
        if first["type"] == "missing":
            raise ConfigError(f"{place} is missing: {_described(kind, place)}") from error
        text = first["msg"].removeprefix("Value error, ")
        place = f"{place}: " if place else ""
        came = "" if first["type"] == "value_error" else f"; got {first['input']!r}"
        raise ConfigError(f"{place}{text}{came}.") from error


def _keys(kind: type[BaseModel], place: str) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"pipelines": PipelineSpec, "reward_models": RewardSpec}
    return list(parts.get(place.split(".")[0], kind).model_fields)


def _described(kind: type[BaseModel], place: str) -> str:
    field = kind.model_fields.get(place)
    return str(field.description) if field is not None else "give it."


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def describe() -> str:
    """Every key with type, default and meaning."""
    blocks = []
    for title, kind in (
        ("Run", GenerationConfig),
        ("Each of pipelines", PipelineSpec),
        ("Each of reward_models", RewardSpec),
    ):
        lines = [title]
        for name, field in kind.model_fields.items():
            default = (
                "required" if field.is_required() else f"default {_yaml(field.get_default(call_default_factory=True))}"
            )
            lines += [f"  {name}: {_type_name(field.annotation)}; {default}", f"      {field.description}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _type_name(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if kind in words:
        return words[kind]
    parts = get_args(kind)
    if parts and all(isinstance(part, str) for part in parts):
        return "one of " + ", ".join(parts)
    if getattr(kind, "__origin__", None) in (list, dict):
        return "a list" if kind.__origin__ is list else "a mapping"
    return " or ".join(_type_name(part) for part in parts)


def _yaml(value: Any) -> str:
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").strip()


def dump(config: GenerationConfig) -> str:
    """The settings as YAML that :func:`load_generation` reads back to the same."""
    return yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


class RerankConfig(RankingConfig):
    """Another judgement of pictures that are there already."""

    table: str = Field(min_length=1, description="The table: a folder, a file or a hub id.")
    split: str = Field("train", description="Split of it.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    rescore: list[str] = Field(default_factory=list, description="Scores to make anew although the table has them.")
    pipeline_weights: dict[str, float] = Field(
        default_factory=dict, description="Under rank_by=pipelines: the weight of each pipeline, by name."
    )

    @model_validator(mode="after")
    def _read(self) -> RerankConfig:
        if bool(self.pipeline_weights) != (self.rank_by == "pipelines"):
            raise ValueError("pipeline_weights and rank_by=pipelines need each other")
        for name in self.rescore:
            if name not in self.scorers:
                raise ValueError(f"rescore: {name!r} is none of reward_models{_near(name, self.scorers)}")
        return self
