"""What is installed and what the machine offers; and one known broken installation, said in one line."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from .errors import ConfigError

PACKAGES = (
    *("diffalign", "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "datasets"),
    *("safetensors", "open_clip_torch", "huggingface_hub", "pydantic", "numpy", "pillow"),
)
OPTIONAL = ("xformers", "bitsandbytes", "tensorboard", "wandb", "trackio", "gradio", "plotly")


class TorchPairError(ConfigError, ImportError):
    """torch and torchvision are installed but do not belong together."""


@cache
def check_torch_pair() -> None:
    """Refuse a torch and a torchvision that cannot work together, without importing either (milliseconds).

    The usual case is a CPU-only torch from a wheel folder that pip found, beside the registry's torchvision: the latter
    then fails at import with "operator torchvision::nms does not exist", and with it open_clip and transformers.

    Raises:
        TorchPairError: names both versions and the command that repairs them.
    """
    torch, vision = _build("torch"), _build("torchvision")
    if torch is None or vision is None:
        return
    needs = [Requirement(text) for text in requires("torchvision") or []]
    too_old = [
        n for n in needs if n.name == "torch" and not n.specifier.contains(torch.split("+")[0], prereleases=True)
    ]
    if too_old:
        raise TorchPairError(_message(torch, vision, f"torchvision needs torch{too_old[0].specifier}"))
    if torch.endswith("+cpu") and "+cu" in vision:
        raise TorchPairError(_message(torch, vision, "a CPU-only torch beside a CUDA torchvision"))


def is_torch_pair_error(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is torchvision's failure to import."""
    while error is not None:
        if "torchvision::nms does not exist" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def broken_pair_message() -> str:
    """What to say when torchvision fails at import although its version numbers gave no reason to expect it."""
    return _message(_build("torch") or "?", _build("torchvision") or "?", "operator torchvision::nms does not exist")


def find_problem() -> str | None:
    """One line on what is wrong with torch and torchvision, found by importing them (seconds); None if nothing is."""
    try:
        check_torch_pair()
        import torchvision  # noqa: F401
    except TorchPairError as error:
        return str(error)
    except (ImportError, RuntimeError) as error:
        if not is_torch_pair_error(error):
            raise
        return broken_pair_message()
    return None


def _message(torch: str, vision: str, why: str) -> str:
    return (
        f"torch {torch} and torchvision {vision} do not match ({why}), so torchvision cannot be imported: install both "
        "from one registry, for example `pip install uv && uv pip install --reinstall torch torchvision`."
    )


def _build(package: str) -> str | None:
    """The version with its build tag, for example 2.13.0+cpu, read from the package's version file, not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "version.py"
    found = re.search(r"__version__ = '([^']+)'", file.read_text()) if file.is_file() else None
    return found.group(1) if found else installed(package)


def installed(package: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def code_commit() -> str | None:
    """The git commit this code is checked out at, with ``+changes`` when tracked files differ; None outside git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def peak_memory() -> float | None:
    """The most memory that this process has held, in GiB; None on a system that does not tell."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def info() -> dict[str, Any]:
    """Versions, devices, attention back ends, and what is installed; plain values only, for ``diffalign info``."""
    problem = find_problem()
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "optional": {name: installed(name) for name in OPTIONAL},
        "problem": problem,
    }
    return report | _offers() | ({} if problem else _devices() | _scorers())


def _devices() -> dict[str, Any]:
    import torch

    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices: list[dict[str, Any]] = [{"type": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}]
    for i, device in enumerate(cuda):
        with torch.cuda.device(i):
            bf16 = torch.cuda.is_bf16_supported()
        gib = round(device.total_memory / 2**30, 1)
        capability = f"{device.major}.{device.minor}"
        devices.append({"type": "cuda", "name": device.name, "GiB": gib, "capability": capability, "bf16": bf16})
    if torch.backends.mps.is_available():
        devices.append({"type": "mps", "name": platform.processor()})
    return {"cuda": torch.version.cuda, "devices": devices, "attention": _attention(bool(cuda))}


def _attention(has_cuda: bool) -> dict[str, Any]:
    import torch

    kernels = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    usable = [name for name, enabled in kernels.items() if enabled and has_cuda]
    return {"sdpa": ["math", *usable], "eager": True, "xformers": find_spec("xformers") is not None}


def _offers() -> dict[str, Any]:
    from .config import METHODS, recipes

    weights = Path(__file__).parent / "shapes" / "weights"
    files = [file for file in weights.rglob("*") if file.is_file()] if weights.is_dir() else []
    return {
        "methods": list(METHODS),
        "recipes": list(recipes()),
        "embedded_model": {"present": bool(files), "MB": round(sum(f.stat().st_size for f in files) / 1e6, 1)},
    }


def _scorers() -> dict[str, Any]:
    from reward_models import available_reward_models

    return {"reward_models": sorted(available_reward_models())}


if __name__ == "__main__":  # the Makefile asks after installing
    found = find_problem()
    sys.exit(f"error: {found}" if found else 0)
