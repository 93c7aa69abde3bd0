"""The data set's README.md with the hub's header, its picture grid, and the upload."""

from __future__ import annotations

import io
import logging
import re
import textwrap
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from PIL import Image, ImageDraw, ImageFont

from ..data.files import atomic_file
from ..data.schema import PreferenceRow
from ..errors import ConfigError
from ..pipelines.hub import HTTP_ERROR

log = logging.getLogger(__name__)
CARD, GRID = "README.md", "grid.png"
_ROWS, _SIDE, _GAP, _TEXT = 8, 160, 8, 36
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"))


def write_card(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write ``README.md`` and ``grid.png``: what is in the table, by which models, under which licences, at what cost.

    Paths of this machine are kept out: a card is made to be published.
    """
    licences = sorted({str(p.get("license") or "unknown") for p in report.get("pipelines", {}).values()})
    data = DatasetCardData(
        pretty_name=folder.resolve().name,
        license=licences[0] if len(licences) == 1 and licences != ["unknown"] else "other",
        task_categories=["text-to-image"],
        size_categories=[next((name for limit, name in _SIZES if report["rows"] < limit), "n>1M")],
        tags=["diffalign", "preference", "synthetic", "ranked-preferences", "image"],
        # No `configs`: `datasets` would key its cache by them and the folder's name alone, and mix tables up.
    )
    shown = _grid(folder)
    sections = [
        f"# {folder.resolve().name}",
        f"{report['rows']} prompts with {report['images']} ranked pictures, drawn and judged by models "
        "(in the manner of Syn-Pic, [RankDPO](https://arxiv.org/abs/2410.18013)). No person judged them.",
        f"![pictures of {shown} prompts, the best on the left]({GRID})",
        _loading(),
        "## Pipelines\n\n" + _pipelines(report),
        "## Reward models\n\n" + _reward_models(report),
        "## Numbers\n\n" + _numbers(report),
        "## Licence\n\nPictures carry the terms of the models that drew them: "
        + (", ".join(licences) if licences else "see each model's own card")
        + ". Scores were made by models under terms of their own, named above.",
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    DatasetCard(text)  # refuses a header that the hub could not read
    with atomic_file(folder / CARD) as file:
        file.write(text.encode())
    return folder / CARD


def _loading() -> str:
    return textwrap.dedent(
        """\
        ```python
        from datasets import load_dataset
        from diffalign import load_preferences

        rows = load_dataset("path/or/id", split="train")     # prompt, images, preference, rank, scores, sources
        dataset = load_preferences("path/or/id")             # for DPOTrainer, RankDPOTrainer, ...
        ```

        `preference` is the share of wins of each picture, `rank` 1 is the best, equal ranks are ties, `scores` are raw.
        What could not be ranked is in `set_aside/`, with the reason."""
    )


def _pipelines(report: Mapping[str, Any]) -> str:
    lines = [
        "| pipeline | model | revision | licence | steps, guidance | pictures | not ranked | mean preference "
        "| diversity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in report["by_pipeline"].items():
        spec = report.get("pipelines", {}).get(name, {})
        lines.append(
            f"| {name} | {public_name(spec.get('model'))} | {spec.get('revision') or '-'} "
            f"| {spec.get('license') or 'unknown'} | {spec.get('steps', '-')}, {spec.get('guidance', '-')} "
            f"| {own['images']} | {own['not_ranked']} | {number(own['mean_preference'])} "
            f"| {number(own['diversity'])} |"
        )
    if of := report.get("diversity_of"):
        measure = "RMS distance of the thumbnails" if of == "thumbnails" else f"cosine distance of the {of} embeddings"
        lines.append(f"\nDiversity: mean {measure} of two pictures of one prompt.")
    return "\n".join(lines)


def _reward_models(report: Mapping[str, Any]) -> str:
    lines = [
        "| score | model, revision, code | licence | votes | mean | deviation | range | missing "
        "| contradicts the ranking |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in report["reward_models"].items():
        identity = own["identity"]
        what = ", ".join(public_name(identity.get(key)) for key in ("id", "revision", "code_version"))
        votes = "yes" if own["votes"] else "no (hold-out)"
        lines.append(
            f"| {name} | {what} | {own['license'] or 'unknown'} | {votes} | {number(own['mean'])} "
            f"| {number(own['deviation'])} | {number(own['lowest'])} to {number(own['highest'])} | {own['missing']} "
            f"| {number(report['contradiction'].get(name))} |"
        )
    agreement = ", ".join(f"{name}: {number(value)}" for name, value in report["agreement"].items())
    return "\n".join(lines) + (
        f"\n\nShare of decided pairs that two models order alike: {agreement}." if agreement else ""
    )


def _numbers(report: Mapping[str, Any]) -> str:
    rows = {
        "rows": report["rows"],
        "ranked pictures": report["images"],
        "rows whose best tie": report["ties_for_first"],
        "rows that tie wholly": report["all_tied"],
        "diversity within a prompt": number(report["diversity"]),
        "seed": report.get("seed", "-"),
        "judged by": report.get("rank_by", "-"),
        "device-seconds, all stages": f"{report['device_seconds']:.0f}",
    }
    rows |= {f"set aside: {reason}": count for reason, count in report["set_aside"].items()}
    rows |= {f"not ranked: {problem}": count for problem, count in report["problems"].items()}
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def public_name(name: str | None) -> str:
    """A model's name without folders of this machine."""
    parts = (name or "-").split(" + ")
    return " + ".join(
        Path(part).absolute().name if Path(part).exists() or part.startswith(("/", ".", "~")) else part
        for part in parts
    )


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """The table's rows, a few at a time; `datasets` would copy all of them into its cache first."""
    for shard in sorted(folder.glob("train-*.parquet")):
        for batch in pq.ParquetFile(shard).iter_batches(_ROWS):
            yield from batch.to_pylist()


def _grid(folder: Path) -> int:
    """The first rows, best picture on the left; returns how many."""
    rows = [PreferenceRow.from_record(cells) for cells in islice(_records(folder), _ROWS)]
    count = len(rows)
    most = max(len(row.rank) for row in rows)
    width, height = most * (_SIDE + _GAP) + _GAP, count * (_SIDE + _TEXT + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, row in enumerate(rows):
        top = _GAP + place * (_SIDE + _TEXT + _GAP)
        pen.text((_GAP, top), textwrap.shorten(row.prompt, max(20, width // 7), placeholder=" ..."), "black", font=font)
        order = sorted(range(len(row.rank)), key=lambda index: row.rank[index])
        for column, index in enumerate(order):
            left = _GAP + column * (_SIDE + _GAP)
            picture = row.images[index]
            scale = _SIDE / max(picture.size)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top + 18))
            pen.text((left, top + _SIDE + 18), f"{row.rank[index]}: {row.preference[index]:.2f}", "gray", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    with atomic_file(folder / GRID) as file:
        file.write(buffer.getvalue())
    return count


def push_table(folder: Path, name: str, *, private: bool = True) -> str:
    """Upload a finished table; the repository is made when missing, files that are there already are not sent again.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: no table, not signed in, an impossible name, or the hub refused or cannot be reached.
    """
    if not (folder / CARD).is_file() or not any(folder.glob("*.parquet")):
        raise ConfigError(f"{folder} holds no finished table with a {CARD}: finish the run first.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(f"expected a data set's name, owner/name, got {name!r}.")
    if get_token() is None:
        raise ConfigError("uploading needs a Hugging Face account: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True, repo_type="dataset")
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=[".work/*", "shards/*", "settings.json", ".*.tmp"],
            commit_message="Preference table made by diffalign",
        )
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is no repository name: {error}") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"the hub refused {name!r}: {error}. The table is safe in {folder}.") from error
    except (HTTP_ERROR, OfflineModeIsEnabled) as error:
        raise ConfigError(f"the hub cannot be reached: {error}. The table is safe in {folder}.") from error
    log.info("pushed %s to %s", folder, repository.repo_id)
    return str(commit.commit_url)
