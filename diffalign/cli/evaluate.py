"""`diffalign evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PROMPTS, REWARD_MODELS = "shapes:heldout", ["shapes-strict", "shapes"]


def evaluate(
    aligned: Annotated[
        list[str],
        typer.Argument(
            help="Folder of a training run, of a LoRA or of a pipeline; several are compared side by side. Each may be "
            "NAME=PATH, and PATH may end in ?negative=PATH for a negative-preference model in guidance."
        ),
    ],
    base: Annotated[str, typer.Option(help="The base model: `shapes`, a hub id or a folder.")] = "shapes",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .json or .jsonl file, shapes:heldout, shapes:seen, or a public set as SET:PATH "
            "(parti, hpdv2, pickapic, drawbench, geneval, dpg, t2i-compbench, unigenbench).",
            show_default=PROMPTS,
        ),
    ] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option(help="Name of a scorer; may be given again.", show_default=" and ".join(REWARD_MODELS)),
    ] = None,
    grader: Annotated[
        str | None,
        typer.Option(
            help="What answers a benchmark's prompt set: mask2former for geneval, an OpenAI-compatible server as "
            "URL#MODEL for unigenbench, or package.module:function."
        ),
    ] = None,
    trained_on: Annotated[
        list[str] | None,
        typer.Option(help="A score that made the preferences; may be given again.", show_default="the run's record"),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the report.", show_default="evaluation/ beside the first model")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Pictures per prompt and model, from seeds 0, 1, ...")] = 4,
    num_prompts: Annotated[int | None, typer.Option(help="Use only so many prompts.", show_default="all")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[
        str, typer.Option(help="Guidance scale, or several as 5,3,7: the report is about the first.")
    ] = "5.0",
    embedding: Annotated[
        str, typer.Option(help="For diversity and drift: pixels, clip or package.module:function.")
    ] = "pixels",
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once; never changes a picture's noise.")] = 16,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.", show_default="fp16 on a GPU")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the GPU")] = None,
    method: Annotated[
        str | None, typer.Option(help="Method of the first model.", show_default="the training run's")
    ] = None,
) -> None:
    """Compare a base and aligned models.

    All draw the same prompts from the same seeds; report.json, report.html and grid.png hold what came of it. A stopped
    evaluation continues when the command is given again.
    """
    from ..environment import check_torch_pair
    from ..errors import ConfigError

    scorers = reward_model or ([] if grader else REWARD_MODELS)
    if base != "shapes" and (prompts is None or not (reward_model or grader)):
        raise ConfigError(
            f"the default prompts and scorers are those of the shapes world; with --base {base} give --prompts FILE "
            "and --reward-model NAME (`diffalign info` lists the names)."
        )
    scales = _scales(guidance)
    check_torch_pair()
    from ..evaluation import evaluate as run
    from ..evaluation.graders import load_grader
    from ..evaluation.models import parse_models
    from .tables import score_table

    models = parse_models(aligned)
    folder = Path(models[0].path)
    if output_dir is None and not folder.exists():
        output_dir = Path("evaluation")
    output = output_dir or (folder.parent if folder.is_file() else folder) / "evaluation"
    report = run(
        base,
        models,
        prompts or PROMPTS,
        output_dir=output,
        seeds=seeds,
        steps=steps,
        guidance=scales,
        reward_models=scorers,
        grader=load_grader(grader, prompts or PROMPTS, device=device) if grader else None,
        trained_on=trained_on,
        embedding=embedding,
        num_prompts=num_prompts,
        batch_size=batch_size,
        height=height,
        width=width,
        dtype=dtype,
        device=device,
        method=method,
        progress=True,
    )
    for model in report["models"]:
        if len(models) > 1:
            typer.echo(f"\n{model['name']}: {model['model']}")
        typer.echo(score_table(model))
    typer.echo(f"report: {output / 'report.html'} (numbers in report.json, pictures in grid.png)")


def _scales(text: str) -> list[float]:
    from ..errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--guidance takes a number, or several as 5,3,7; got {text!r}.") from None
