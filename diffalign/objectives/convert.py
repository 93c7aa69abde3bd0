"""What beta means elsewhere: the same number is a different pull to the reference in almost every code."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from .base import check_positive


@dataclass(frozen=True)
class Convention:
    """How a code writes DPO's logit.

    Args:
        logit: what stands inside its ``logsigmoid``; gap is (l_w - r_w) - (l_l - r_l).
        half: whether beta is halved there, as it is here.
        summed: whether errors are summed over C, H, W; otherwise averaged, as they are here.
        default: its default beta, if it has one.
        space: what the error is taken of: the number converts, this does not.
        source: where it was read.
    """

    logit: str
    half: bool
    summed: bool
    default: float | None
    space: str
    source: str


NATIVE, UNREAD = "as the model predicts", "not looked up"
CONVENTIONS: dict[str, Convention] = {
    "diffalign": Convention("-1/2 beta gap", True, False, 5000, "`loss_space`", "`dpo_loss`"),
    "salesforce": Convention("-1/2 beta gap", True, False, 5000, "epsilon", "DiffusionDPO `train.py`"),
    "diffusers_sdxl": Convention("-1/2 beta gap", True, False, 5000, NATIVE, "`train_diffusion_dpo_sdxl.py`"),
    "diffusers_sd": Convention("-beta gap", False, False, 2500, NATIVE, "`train_diffusion_dpo.py`"),
    "diffusion_tinker": Convention("-beta gap", False, False, 5000, UNREAD, "`diffusion_dpo_trainer.py`"),
    "flow_factory": Convention("-1/2 beta gap", True, False, 2000, "velocity", "`trainers/dpo.py`; a recipe has 100"),
    "flow_grpo": Convention("-1/2 beta gap", True, False, 100, "velocity", "`train_sd3_dpo.py`; later advice 2000"),
    "verl_omni": Convention("-1/2 beta gap", True, False, 2000, UNREAD, "`diffusion_algos.py`; recipes have 100"),
    "simpletuner": Convention("-1/2 beta gap", True, True, None, "velocity", "flow DPO; automatic, within 0.001 and 1"),
    "simpletuner_mean": Convention("-1/2 beta gap", True, False, None, "velocity", "the same, `norm_type` mean"),
    "smpo": Convention("-1/2 beta c gap", True, False, 5000, "epsilon", "SmPO `train.py`; for `smpo_loss(gamma=10)`"),
    "dpo_paper": Convention("-beta gap", False, True, None, "epsilon", "2311.12908 Eq. 14 with T folded into beta"),
    "rankdpo_paper": Convention("-beta gap", False, True, None, "epsilon", "2410.18013, as printed"),
}

NOT_COMPARABLE = {
    "mapo": "MaPO has no reference: its beta weighs the margin against fine-tuning. Pass it to mapo_loss as it is.",
    "mapo_paper": "the paper's beta of MaPO is an exponent. Pass it to mapo_loss as exponent.",
    "trl": "TRL's beta multiplies log-likelihood ratios of text, not denoising errors.",
}


def convert_beta(value: float, *, source: str, target: str = "diffalign", elements: int | None = None) -> float:
    """Translate a beta from one code's convention to another's, so that both compute the same logit.

    Only the scale is translated. Codes whose errors live in different spaces (epsilon, velocity) weigh timesteps
    differently, which no single number makes up for: ``CONVENTIONS[name].space`` says which.

    Args:
        value: beta as written in ``source``.
        source: name of a convention, see ``CONVENTIONS``.
        target: the same; ``diffalign`` is the scale of every ``beta`` in this library.
        elements: n = C * h * w of one latent (SD 1.5 at 512: 16384; SDXL at 1024: 65536; SD3 at 1024: 262144). Needed
            when exactly one of the two sums over elements, since its beta then depends on the resolution.

    Returns:
        The beta to write in ``target``.

    Raises:
        ValueError: a beta that is not positive, an unknown or incomparable convention, or a missing ``elements``.
    """
    check_positive("beta", value)
    here, there = _convention(source), _convention(target)
    if here.summed != there.summed and elements is None:
        summed = source if here.summed else target
        raise ValueError(
            f"{summed} sums errors over the latent, so its beta depends on the resolution: pass elements=C*h*w of one "
            "latent, e.g. 65536 for SDXL at 1024 x 1024."
        )
    if elements is not None and elements < 1:
        raise ValueError(f"elements must be the number of values in one latent, at least 1; got {elements!r}.")
    return value * _scale(here, elements) / _scale(there, elements)


def _convention(name: str) -> Convention:
    if name in CONVENTIONS:
        return CONVENTIONS[name]
    if name in NOT_COMPARABLE:
        raise ValueError(f"a beta of {name!r} cannot be converted: {NOT_COMPARABLE[name]}")
    near = difflib.get_close_matches(name, CONVENTIONS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown beta convention {name!r}.{hint} Known: {', '.join(CONVENTIONS)}.")


def _scale(convention: Convention, elements: int | None) -> float:
    """Its beta of 1, in ours. Two sums over the same elements cancel, whatever their number."""
    return (1.0 if convention.half else 2.0) * ((elements or 1) if convention.summed else 1)
