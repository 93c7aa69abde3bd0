"""The embedded default end to end: generate, rank, train Diffusion-DPO, evaluate on held-out prompts, report.

Each stage leaves its result in the output folder and is skipped when it is already there, so a stopped quickstart
continues where it was.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.files import write_whole
from .environment import peak_memory
from .errors import ConfigError

if TYPE_CHECKING:
    from .data import PreferenceDataset

log = logging.getLogger(__name__)
RECIPE = "shapes-dpo"


@dataclass(frozen=True)
class Settings:
    """Size of the run.

    Args:
        seed: key of prompts, pictures and training.
        prompts: training prompts, of seen combinations.
        images_per_prompt: candidates drawn for each.
        heldout_prompts: evaluation prompts; each names a combination that no training data contains.
        steps: sampling steps of all pictures.
        guidance: guidance scale of all pictures.
        batch_size: pictures drawn at once.
    """

    seed: int = 0
    prompts: int = 320
    images_per_prompt: int = 6
    heldout_prompts: int = 600
    steps: int = 12
    guidance: float = 3.0
    batch_size: int = 32


def run(output_dir: str | Path, *, seed: int = 0, overrides: list[str] | None = None, **sizes: Any) -> dict[str, Any]:
    """Run all stages and write the report.

    Args:
        output_dir: everything goes here; a folder with other settings is refused.
        seed: key of all randomness.
        overrides: ``key=value`` settings in place of the recipe's.
        sizes: fields of :class:`Settings`.

    Returns:
        The content of ``report.json``.

    Raises:
        ConfigError: the folder holds a quickstart with other settings.
    """
    folder, settings = Path(output_dir), Settings(seed=seed, **sizes)
    _claim(folder, settings, overrides or [])
    seconds: dict[str, float] = {}

    began = time.perf_counter()
    preferences = make_preferences(folder / "preferences", settings)
    seconds["generate_and_rank"] = time.perf_counter() - began

    began = time.perf_counter()
    train(folder / "preferences", folder / "run", seed, overrides, dataset=preferences)
    seconds["train"] = time.perf_counter() - began

    began = time.perf_counter()
    report = measure(folder / "run", folder, settings)
    seconds["evaluate"] = time.perf_counter() - began

    report["seconds"] = seconds | {"total": sum(seconds.values())}
    report["peak_memory_gib"] = peak_memory()
    report["next_commands"] = next_commands(folder)
    write_whole(folder / "report.json", json.dumps(report, indent=2))
    return report


def make_preferences(folder: Path, settings: Settings) -> PreferenceDataset:
    """Draw candidates for training prompts, let the checker rank them, write the table (or find it finished)."""
    from reward_models import load_reward_model

    from .data import load_preferences
    from .pipelines import load_pipeline
    from .shapes import sample_captions
    from .synthesis import build_preferences

    if not any(folder.glob("*.parquet")):
        prompts = sample_captions(settings.prompts, seed=1000 + settings.seed)
        log.info("drawing %d pictures for %d prompts ...", len(prompts) * settings.images_per_prompt, len(prompts))
        build_preferences(
            load_pipeline("shapes"),
            prompts,
            images_per_prompt=settings.images_per_prompt,
            reward_models=[load_reward_model("shapes")],
            folder=folder,
            seed=settings.seed,
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=settings.batch_size,
        )
    return load_preferences(folder)


def train(
    table: Path | str,
    folder: Path,
    seed: int,
    overrides: list[str] | None = None,
    *,
    dataset: PreferenceDataset | str,
    recipe: str = RECIPE,
) -> dict[str, Any]:
    """Train a recipe on a table, or continue what was stopped.

    Args:
        table: where the preferences, or prompts, are; recorded in the run's ``config.yaml``.
        folder: of the run.
        seed: run seed.
        overrides: ``key=value`` settings in place of the recipe's.
        dataset: the loaded table, or prompts for methods that draw their own pictures.
        recipe: name of the recipe.
    """
    from .config import dump, load_job, trainer_class

    fixed = [f"dataset={table}", f"output_dir={folder}", f"seed={seed}", "resume=latest"]
    job, config = load_job(recipe, [*fixed, *(overrides or [])])
    trainer = trainer_class(job.method)("shapes", config, train_dataset=dataset)
    write_whole(folder / "config.yaml", dump(job, config))
    return trainer.train()


def measure(aligned: Path, folder: Path, settings: Settings, *, held_out: bool = True) -> dict[str, Any]:
    """Compare the base and the aligned model, one picture per prompt, both from the same noise."""
    from .evaluation.run import evaluate
    from .shapes import sample_captions

    split = 2000 if held_out else 3000
    return evaluate(
        "shapes",
        aligned,
        sample_captions(settings.heldout_prompts, seed=split + settings.seed, held_out=held_out),
        output_dir=folder,
        seeds=1,
        steps=settings.steps,
        guidance=settings.guidance,
        batch_size=settings.batch_size,
        reward_models=("shapes-strict", "shapes"),
    )


def next_commands(folder: Path) -> list[str]:
    """What to try after the quickstart."""
    table = folder / "preferences"
    return [
        f"diffalign data check {table}",
        f"diffalign train shapes-dpo dataset={table} output_dir={folder.parent / 'longer'} max_steps=1000",
        f"diffalign evaluate {folder / 'run'} --prompts shapes:seen --output-dir {folder.parent / 'seen'}",
    ]


def _claim(folder: Path, settings: Settings, overrides: list[str]) -> None:
    """Record the settings, or make sure that they are those of the run that is continued."""
    record = {**asdict(settings), "overrides": overrides}
    file = folder / "quickstart.json"
    if file.is_file() and json.loads(file.read_text()) != record:
        raise ConfigError(f"{folder} holds a quickstart with other settings. Choose another --output-dir or delete it.")
    write_whole(file, json.dumps(record, indent=2))
