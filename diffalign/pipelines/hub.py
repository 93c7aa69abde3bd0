"""What the hub says: why it did not give a model, in one sentence that names what to do; and a model's licence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FOLDER = "or give a local folder"
#: What every error of the client's HTTP library is; which library that is depends on the client's version.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def hub_problem(error: BaseException, name: str, revision: str | None = None) -> str | None:
    """What the hub client said, which diffusers buries below an error about its cache.

    Args:
        error: what loading a model raised.
        name: hub id of the model.
        revision: that was asked for.

    Returns:
        A sentence without its subject's name in front; None when the hub had no part in it.
    """
    for cause in _chain(error):
        if isinstance(cause, GatedRepoError):  # also a RepositoryNotFoundError
            return (
                f"its makers want their terms accepted: do so at https://huggingface.co/{name}, then `hf auth login`."
            )
        if isinstance(cause, RepositoryNotFoundError):
            return f"there is none of this name, or it is private: check the spelling, `hf auth login`, {FOLDER}."
        if isinstance(cause, RevisionNotFoundError):
            return f"it has no revision {revision!r}: leave revision out, or name a branch, tag or commit of it."
        if isinstance(cause, OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set and the model is not in the cache: unset it once, {FOLDER}."
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
            return f"the hub answered with status {cause.response.status_code}: try again later, {FOLDER}."
        if isinstance(cause, HTTP_ERROR) and not hasattr(cause, "response"):
            return f"the hub cannot be reached ({cause}): check the network, {FOLDER}."
    return None


def model_licence(name: str, *, ask_hub: bool = True) -> str | None:
    """Licence id of a model, from its card.

    Args:
        name: ``shapes``, a folder or a hub id.
        ask_hub: whether to fetch the card of a hub id; where the hub cannot be reached that takes half a minute.

    Returns:
        None where there is no card at hand, or it states none.
    """
    if name == "shapes":
        return "apache-2.0"
    folder = Path(name)
    try:
        if folder.exists():
            return ModelCard.load(folder / "README.md").data.license if (folder / "README.md").is_file() else None
        return ModelCard.load(name).data.license if ask_hub else None
    except (OSError, ValueError, yaml.YAMLError, HTTP_ERROR):
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, the first of them first."""
    if error is not None:
        yield from _chain(error.__cause__ or error.__context__)
        yield error
