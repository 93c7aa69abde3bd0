"""`diffalign train`: a job file, overrides, a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ..config import Job
    from ..trainers.config import TrainingConfig


class TrainCommand(TyperCommand):
    """Its help ends with every key of the configuration, made from the dataclasses."""

    def get_help(self, ctx: Any) -> str:
        """Usage and options, then all keys."""
        from ..config import describe, recipes

        parts = [
            super().get_help(ctx),
            f"Recipes: {', '.join(recipes())}",
            "Keys (in CONFIG as `key: value`, here as key=value):",
            describe(),
        ]
        return "\n\n".join(parts)


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a recipe: shapes-dpo.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's, as in YAML.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, print them all as YAML, and stop.")
    ] = False,
) -> None:
    """Align a model with preferences.

    On many GPUs: accelerate launch --config_file training/launch/multi_gpu.yaml training/train.py CONFIG [KEY=VALUE]...
    """
    from ..config import dump, load_job

    job, settings = load_job(config, overrides or [])
    if check:
        typer.echo(dump(job, settings), nl=False)
        return
    folder, report = run_job(job, settings)
    if report is None:
        return
    typer.echo(f"{report['steps']} steps in {report['seconds']:.0f} s on {report['examples']} examples.")
    for alarm in report["alarms"]:
        typer.echo(f"alarm: {alarm['message'] if isinstance(alarm, dict) else alarm}")
    typer.echo(f"weights: {folder}\nreport:  {Path(settings.output_dir) / 'training_report.json'}")


def run_job(job: Job, config: TrainingConfig) -> tuple[Path, dict[str, Any] | None]:
    """Train as a job says; its resolved settings are saved as ``config.yaml`` beside the results.

    Args:
        job: what to train on what.
        config: settings, already checked.

    Returns:
        The folder of the final weights, and the trainer's report (None on all processes but the first).
    """
    from ..config import dump, trainer_class
    from ..config_rules import check_installed
    from ..environment import check_torch_pair

    check_installed(config)
    check_torch_pair()
    from ..data.files import write_whole
    from ..pipelines import load_pipeline

    trainer_type = trainer_class(job.method)
    # The data first: they are read in seconds, a large model in minutes.
    dataset = trainer_type.load_dataset(
        job.dataset,
        split=job.dataset_split,
        revision=job.dataset_revision,
        score=job.dataset_score,
        bad_rows=job.bad_rows,
    )
    pipeline = load_pipeline(job.model, revision=job.model_revision, variant=job.model_variant, config=job.model_config)
    trainer = trainer_type(pipeline, config, train_dataset=dataset, base_model=job.model)
    if trainer.accelerator.is_main_process:
        write_whole(trainer.output_dir / "config.yaml", dump(job, config))
    report = trainer.train()
    return trainer.output_dir / "final", report if trainer.accelerator.is_main_process else None
