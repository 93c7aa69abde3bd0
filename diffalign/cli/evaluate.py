"""`diffalign evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PROMPTS, REWARD_MODELS = "shapes:heldout", ["shapes-strict", "shapes"]


def evaluate(
    aligned: Annotated[str, typer.Argument(help="Folder of a training run, of a LoRA or of a pipeline.")],
    base: Annotated[str, typer.Option(help="The base model: `shapes`, a hub id or a folder.")] = "shapes",
    prompts: Annotated[
        str | None,
        typer.Option(help="A .txt, .json or .jsonl file, shapes:heldout or shapes:seen.", show_default=PROMPTS),
    ] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option(help="Name of a scorer; may be given again.", show_default=" and ".join(REWARD_MODELS)),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the report.", show_default="evaluation/ beside the aligned model")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Pictures per prompt and model, from seeds 0, 1, ...")] = 4,
    num_prompts: Annotated[int | None, typer.Option(help="Use only so many prompts.", show_default="all")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once; never changes a picture's noise.")] = 16,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.", show_default="fp16 on a GPU")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the GPU")] = None,
    method: Annotated[str | None, typer.Option(help="Name of the method.", show_default="the training run's")] = None,
) -> None:
    """Compare a base and an aligned model.

    Both draw the same prompts from the same seeds; report.json, report.html and grid.png hold what came of it.
    """
    from ..environment import check_torch_pair
    from ..errors import ConfigError

    if base != "shapes" and (prompts is None or not reward_model):
        raise ConfigError(
            f"the default prompts and scorers are those of the shapes world; with --base {base} give --prompts FILE "
            "and --reward-model NAME (`diffalign info` lists the names)."
        )
    check_torch_pair()
    from ..evaluation import evaluate as run
    from .tables import score_table

    folder = Path(aligned)
    output = output_dir or (folder.parent if folder.is_file() else folder) / "evaluation"
    report = run(
        base,
        aligned,
        prompts or PROMPTS,
        output_dir=output,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        reward_models=reward_model or REWARD_MODELS,
        num_prompts=num_prompts,
        batch_size=batch_size,
        height=height,
        width=width,
        dtype=dtype,
        device=device,
        method=method,
        progress=True,
    )
    typer.echo(score_table(report))
    typer.echo(f"report: {output / 'report.html'} (numbers in report.json, pictures in grid.png)")
