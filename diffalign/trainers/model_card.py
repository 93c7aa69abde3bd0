"""The README.md of trained weights, and their upload to the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .health import Alarm

log = logging.getLogger(__name__)
CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOCAL_SETTINGS = {"output_dir", "cache_dir", "resume", "push_to_hub", "hub_model_id", "hub_private", "progress_bar"}


@dataclass(frozen=True)
class Method:
    """What a card says of a training method.

    Args:
        name: in plain words.
        tag: on the hub.
        summary: one or two sentences on what was optimised; fields of the config in braces.
        paper: title and arXiv id, or None.
        bibtex: citation, or None.
    """

    name: str
    tag: str
    summary: str
    paper: str | None = None
    bibtex: str | None = None


NEGATIVE = (
    "**This is a negative model.** On its own it draws worse pictures, or at best no better ones: it is made to "
    "predict the unconditional branch of classifier-free guidance, away from which the base model is then guided."
)
METHODS: dict[str, Method] = {
    "DPOConfig": Method(
        name="Diffusion-DPO",
        tag="dpo",
        summary=(
            "Diffusion-DPO trains on pairs of images of one prompt: it lowers the denoising error of the preferred "
            "image and raises that of the other, each relative to the frozen base model. Loss `{loss_type}` with beta "
            "{beta:g} in the convention logit = -beta/2 x error gap, errors averaged over channels and pixels."
        ),
        paper="Diffusion Model Alignment Using Direct Preference Optimization (arXiv:2311.12908)",
        bibtex="""@inproceedings{wallace2024diffusion,
  title     = {Diffusion Model Alignment Using Direct Preference Optimization},
  author    = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and
               Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
  booktitle = {CVPR},
  year      = {2024},
  eprint    = {2311.12908},
  archivePrefix = {arXiv}
}""",
    ),
    "SelfNPOConfig": Method(
        name="Self-NPO",
        tag="self-npo",
        summary=(
            "Self-NPO fine-tunes a model on clean latents that a {teacher} teacher (guidance {teacher_guidance:g}, "
            "{truncation_steps} steps) sees in its own truncated samples; no images and no preferences are used."
        ),
        paper="Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning (arXiv:2505.11777)",
    ),
    "SFTConfig": Method(
        name="Supervised fine-tuning on winners",
        tag="sft",
        summary=(
            "Plain denoising training on the preferred image of each pair; the other image is ignored. This is the "
            "control that preference methods are measured against."
        ),
    ),
}


def write_model_card(
    folder: str | Path,
    *,
    config: TrainingConfig,
    base_model: str,
    pipeline_class: str,
    dataset: str | None = None,
    examples: int | None = None,
    steps: int | None = None,
    metrics: Mapping[str, float] | None = None,
    alarms: Sequence[Alarm] = (),
    base_model_license: str | None = None,
    images: Sequence[str | Path] = (),
) -> Path:
    """Write ``README.md`` into a folder of final weights.

    Paths of this machine are kept out: a card is made to be published.

    Args:
        folder: holds the weights.
        config: the run's settings; its class names the method.
        base_model: hub id or folder of the base, or ``shapes``.
        pipeline_class: name of the diffusers class, for example ``StableDiffusionXLPipeline``.
        dataset: hub id or folder of the preferences.
        examples: how many pairs or lists were trained on.
        steps: optimizer steps done.
        metrics: the last health numbers, by name.
        alarms: every alarm that fired.
        base_model_license: licence id of the base on the hub; the weights inherit it.
        images: picture files to show; copied into ``images/`` of the folder.

    Returns:
        The written file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    method = METHODS.get(type(config).__name__) or _unknown_method(config)
    data = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        base_model_relation=("finetune" if config.adapter == "none" else "adapter") if _is_hub_id(base_model) else None,
        datasets=[dataset] if dataset and _is_hub_id(dataset) else None,
        library_name="diffusers",
        license=base_model_license,
        pipeline_tag="text-to-image",
        tags=["diffalign", method.tag, "preference-alignment", *([] if config.adapter == "none" else [config.adapter])]
        + (["lora"] if config.adapter == "dora" else []),
    )
    title = config.hub_model_id or Path(config.output_dir).resolve().name
    sections = [
        f"# {title}",
        _introduction(config, method, base_model, dataset, examples, steps),
        _pictures(folder, images),
        "## Use\n\n" + _loading(config, base_model, pipeline_class, title),
        _health(metrics or {}, alarms),
        "## Settings\n\n" + _settings(config),
        _licence(base_model, base_model_license),
        f"## Citation\n\n{method.paper}\n\n```bibtex\n{method.bibtex}\n```" if method.bibtex else "",
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    ModelCard(text)  # refuses a header that the hub could not read
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path


def push_to_hub(folder: str | Path, config: TrainingConfig) -> str:
    """Upload a folder of final weights; the repository is made when missing.

    Args:
        folder: weights and README.md; everything in it is uploaded, so give no folder of checkpoints or caches.
        config: reads ``hub_model_id``, ``hub_private`` and, for the default name, ``output_dir``.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: no card in the folder, an impossible name, not signed in, or the hub refused.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder} has no {CARD}: write the model card before pushing.")
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    api = HfApi()
    if get_token() is None:
        raise ConfigError("push_to_hub needs a Hugging Face account: run `hf auth login`, or set HF_TOKEN.")
    try:
        repository = api.create_repo(name, private=config.hub_private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=f"Weights trained by diffalign ({_tag(config)})",
        )
    except HFValidationError as error:
        raise ConfigError(f"hub_model_id {name!r} is no repository name: {error}") from error
    except HfHubHTTPError as error:
        raise ConfigError(
            f"the hub refused to store {name!r}: {error}. The weights are safe in {folder}; check the name and that "
            "your token may write, then push again."
        ) from error
    log.info("pushed %s to %s", folder, repository.repo_id)
    return commit.commit_url


def _introduction(
    config: TrainingConfig, method: Method, base: str, dataset: str | None, examples: int | None, steps: int | None
) -> str:
    what = {"lora": "LoRA adapter", "dora": "DoRA adapter", "none": "Fully fine-tuned denoiser"}[config.adapter]
    source = f" on {_name(dataset, kind='datasets/')}" if dataset else ""
    amount = f" ({examples} examples)" if examples is not None else ""
    length = f" for {steps} optimizer steps" if steps is not None else ""
    return (
        f"{what} for {_name(base)}, trained with **{method.name}**{source}{amount}{length} by `diffalign`.\n\n"
        + method.summary.format(**dataclasses.asdict(config))
        + (f"\n\n{NEGATIVE}" if _is_negative(config) else "")
    )


def _loading(config: TrainingConfig, base: str, pipeline_class: str, title: str) -> str:
    here = f'"{title}"' if config.hub_model_id else '"path/to/this/folder"'
    if _is_negative(config):
        source = base if _is_hub_id(base) or base == "shapes" else "path/to/the/base/model"
        lines = [
            "from diffalign.guidance import negative_guidance",
            "from diffalign.pipelines import load_pipeline",
            "",
        ]
        lines += [f'pipeline = load_pipeline("{source}")', 'with negative_guidance(pipeline, "path/to/this/folder"):']
        lines.append('    image = pipeline("your prompt").images[0]')
        return "```python\n" + "\n".join(lines) + "\n```"
    if config.adapter == "none":
        lines = [f"from diffusers import {pipeline_class}", "", f"pipeline = {pipeline_class}.from_pretrained({here})"]
    elif base == "shapes":
        lines = ["from diffalign.pipelines import load_pipeline", "", 'pipeline = load_pipeline("shapes")']
    else:
        source = base if _is_hub_id(base) else "path/to/the/base/model"
        lines = [f"from diffusers import {pipeline_class}", ""]
        lines.append(f'pipeline = {pipeline_class}.from_pretrained("{source}")')
    if config.adapter != "none":
        lines.append(f"pipeline.load_lora_weights({here})")
    lines.append('image = pipeline("your prompt").images[0]')
    return "```python\n" + "\n".join(lines) + "\n```"


def _pictures(folder: Path, images: Sequence[str | Path]) -> str:
    """Copies pictures next to the card; base on the left, this model on the right, as validation draws them."""
    links = []
    for image in map(Path, images):
        target = folder / "images" / image.name
        target.parent.mkdir(exist_ok=True)
        if image.resolve() != target.resolve():
            shutil.copyfile(image, target)
        links.append(f"![base and aligned images from the same noise](images/{image.name})")
    return "\n\n".join(links)


def _health(metrics: Mapping[str, float], alarms: Sequence[Alarm]) -> str:
    if not metrics:
        return ""
    rows = [f"| `{name}` | {_number(value)} |" for name, value in metrics.items() if not name.startswith("timesteps/")]
    fired = [f"- step {alarm.step}, {alarm.name}: {alarm.message}" for alarm in alarms]
    verdict = "Alarms while training:\n\n" + "\n".join(fired) if fired else "No alarm fired while training."
    return "## Health at the end of training\n\n| | |\n|---|---|\n" + "\n".join(rows) + f"\n\n{verdict}"


def _settings(config: TrainingConfig) -> str:
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _LOCAL_SETTINGS}
    rows = [f"| `{name}` | {_cell(value)} |" for name, value in values.items()]
    return "| setting | value |\n|---|---|\n" + "\n".join(rows)


def _licence(base: str, licence: str | None) -> str:
    if licence is not None:
        return f"## Licence\n\n`{licence}`, as {_name(base)}, from which these weights derive."
    return f"## Licence\n\nThese weights derive from {_name(base)}, whose licence applies: add it here before sharing."


def _cell(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _name(source: str, kind: str = "") -> str:
    """A model, or with ``kind="datasets/"`` a data set, without the path it has on this machine."""
    if _is_hub_id(source):
        return f"[{source}](https://hf.co/{kind}{source})"
    return f"`{Path(source).name}`" if source else "an unnamed base model"


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def _is_negative(config: TrainingConfig) -> bool:
    """Whether the weights are made for the unconditional branch of guidance."""
    return type(config).__name__ == "SelfNPOConfig" or bool(getattr(config, "negative", False))


def _tag(config: TrainingConfig) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _unknown_method(config: TrainingConfig) -> Method:
    """A method from outside this package: named by its config, without a citation."""
    name = type(config).__name__.removesuffix("Config")
    return Method(name=name, tag=_tag(config), summary=f"Trained with the method {name}.")
