"""Finding, reading and loading weights, from hub or disk, with every key accounted for and no code run from files."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseRewardModel
from .errors import RewardModelError

State = dict[str, Tensor]
_DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
_SAMPLES = 64  # values hashed of each tensor


class WeightsRewardModel(BaseRewardModel):
    """A reward model with weights: where it runs, in what precision, and what identifies it."""

    formula = 1  # raised whenever the same weights would give other scores

    def __init__(self, device: str | None, dtype: torch.dtype, batch_size: int) -> None:
        if batch_size < 1:
            raise RewardModelError(f"batch_size must be at least 1, got {batch_size}.")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype, self.batch_size = dtype, batch_size
        self._identity: dict[str, str | None] = {}

    @property
    def identity(self) -> dict[str, str | None]:
        """``revision`` is a hash of the weights as loaded, so that a hub copy and a local copy are the same model."""
        return dict(self._identity)

    def _identify(self, source: str | Path, *modules: nn.Module, **settings: Any) -> None:
        """Record what scores depend on: weights, code, precision and every setting that changes a number."""
        settings["dtype"] = str(self.dtype).removeprefix("torch.")
        libraries = [f"{name} {version(_DISTRIBUTIONS.get(name, name))}" for name in self.requires]
        self._identity = {
            "id": str(source),
            "revision": fingerprint(*modules),
            "code_version": ", ".join([f"formula {self.formula}", *libraries]),
            "settings": json.dumps(settings, sort_keys=True),
        }


def fingerprint(*modules: nn.Module) -> str:
    """Short hash of names, shapes and evenly spaced values of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // _SAMPLES)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def find_file(source: str | Path, filename: str, revision: str | None = None) -> Path:
    """The file ``source``, ``filename`` in the folder ``source``, or ``filename`` in the hub repository ``source``.

    Raises:
        RewardModelError: none of the three; the message says what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise RewardModelError(
            f"the folder {path} has no {filename}; give the file itself or the folder that holds it."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(source), filename, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise RewardModelError(
            f"{source!s} is neither a file nor a folder, and the hub does not give {filename} of it "
            f"({type(error).__name__}: {error}). Offline, give the path of a downloaded copy."
        ) from error


def read_state(path: Path) -> State:
    """All tensors of a safetensors file or of a torch file, which is read without running any code in it.

    A torch file may hold them under ``state_dict`` or ``model``, as training scripts write them.

    Raises:
        RewardModelError: no tensors, or a pickled object instead of tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RewardModelError(f"cannot read {path}: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RewardModelError(
            f"{path} holds pickled objects, not only tensors, and loading it could run any code. In the environment "
            "its makers ask for, save its state_dict() and give that file."
        ) from error
    except (OSError, RuntimeError, EOFError, LookupError, ValueError) as error:  # what torch raises for other files
        raise RewardModelError(f"cannot read {path}: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise RewardModelError(f"{path} holds no state dict of tensors.")
    return content


def read_part(source: str | Path, prefixes: tuple[str, ...], revision: str | None = None) -> State:
    """The tensors under ``prefixes`` of a checkpoint as transformers saves it: one file or several, of either kind.

    Raises:
        RewardModelError: the folder or hub repository ``source`` holds no such checkpoint.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        names = {single}
        try:
            try:
                index = json.loads(find_file(source, f"{single}.index.json", revision).read_text(encoding="utf-8"))
                names = {file for key, file in index["weight_map"].items() if key.startswith(prefixes)}
            except RewardModelError:
                pass  # not in several files
            states = [read_state(find_file(source, name, revision)) for name in sorted(names)]
        except RewardModelError as error:
            problem = error
            continue
        return {key: value for state in states for key, value in state.items() if key.startswith(prefixes)}
    raise problem


def take(state: State, prefix: str, *, drop: Iterable[str] = ()) -> State:
    """The entries of ``state`` under ``prefix``, without it and without names that start with one of ``drop``."""
    dropped = tuple(drop)
    cut = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in cut.items() if not (dropped and key.startswith(dropped))}


def refuse_rest(state: State, known: Iterable[str], label: str) -> None:
    """Raise unless every key of ``state`` starts with one of ``known``."""
    rest = [key for key in state if not key.startswith(tuple(known))]
    if rest:
        raise RewardModelError(
            f"{label}: unexpected keys {_some(rest)}; this is not the checkpoint it was written for."
        )


def load_exactly(module: nn.Module, state: State, label: str) -> None:
    """``load_state_dict`` that raises :class:`RewardModelError` on any missing, unexpected or misshapen key."""
    wanted = module.state_dict()
    refuse_mismatch(
        label,
        missing=[key for key in wanted if key not in state],
        unexpected=[key for key in state if key not in wanted],
        misshapen=[key for key in wanted if key in state and wanted[key].shape != state[key].shape],
    )
    module.load_state_dict(state)


def refuse_mismatch(label: str, **problems: Iterable[str]) -> None:
    """Raise when any list of keys is not empty."""
    found = [f"{kind} keys {_some(sorted(keys))}" for kind, keys in problems.items() if keys]
    if found:
        raise RewardModelError(f"{label}: {'; '.join(found)}; this is not the checkpoint it was written for.")


def load_pretrained(
    cls: Any, source: str | Path, label: str, *, revision: str | None = None, whole: bool = False, **options: Any
) -> Any:
    """``cls.from_pretrained`` that raises :class:`RewardModelError`, also where transformers would only warn.

    Weights that are missing are an error. Weights that belong to other parts of the checkpoint are one when ``whole``.
    """
    is_model = hasattr(cls, "base_model_prefix")
    if revision is not None:
        options["revision"] = revision
    if is_model:
        options["output_loading_info"] = True
    try:
        loaded = cls.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardModelError(
            f"{label}: cannot load {cls.__name__} from {source!s}: {error}. Offline, give a downloaded folder."
        ) from error
    if not is_model:
        return loaded
    model, info = loaded
    refuse_mismatch(
        label,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"] if whole else (),
        misshapen=[key for key, *_ in info["mismatched_keys"]],
    )
    return model.eval().requires_grad_(False)


def build_from_state(cls: Any, config: Any, state: State, label: str, dtype: torch.dtype, **options: Any) -> Any:
    """A transformers model of ``config`` with exactly the weights ``state``, never filled with random ones."""
    options |= {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
    try:
        model, info = cls.from_pretrained(None, **options)
    except (ValueError, RuntimeError) as error:
        raise RewardModelError(f"{label}: the weights do not fit {cls.__name__}: {error}") from error
    refuse_mismatch(
        label,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        misshapen=[key for key, *_ in info["mismatched_keys"]],
    )
    return model.eval().requires_grad_(False)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
