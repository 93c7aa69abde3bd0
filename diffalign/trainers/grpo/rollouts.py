"""Drawing pictures with the policy, keeping what is needed to find each step's density again.

One loop serves every family: the adapter says at which noise levels its pipeline samples and how its network is called,
:mod:`diffalign.diffusion.stochastic` how one level leads to the next. What a picture sees is keyed by (run seed, group,
place in the group), so batches, processes and a restart change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...diffusion import Transition, transitions
from ...errors import ConfigError
from ...randomness import keyed_normal, keyed_permutation, keyed_seed
from ..policy import DTYPES

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion import SamplingGrid, Schedule
    from ...pipelines import PipelineAdapter
    from ..config import PrefGRPOConfig
    from ..prompts import EncodedPrompts

Shape = tuple[int, int, int]
Told = tuple[dict[str, Tensor], Tensor]  # conditioning of a call by name, and SDXL's sizes
#: Deterministic steps at the end where nothing else is asked: the two with the smallest noise carry 6 to 9 times the
#: weight of others in an unweighted loss of a variance-preserving model, and leave their noise in the scored picture.
FINAL_STEPS = {"variance_preserving": 2, "flow": 1}


@dataclass(frozen=True)
class Sample:
    """One picture to draw: its prompt, its group (counted over the whole run) and its place in the group."""

    prompt: str
    group: int
    member: int


@dataclass
class Moment:
    """What is kept of one term of a chunk.

    Args:
        log_prob: (N,) under the policy that drew the pictures.
        x, x_next: (N, C, h, w) states before and after a trained step, in the precision in which they are kept.
        mean: (N, C, h, w) fp32 of that step under that policy; kept for RatioNorm only.
    """

    log_prob: Tensor
    x: Tensor | None = None
    x_next: Tensor | None = None
    mean: Tensor | None = None


@dataclass
class Chunk:
    """N pictures that were drawn together, and are replayed together so that every kernel sees the same shapes.

    Args:
        samples: which pictures.
        moments: their terms by index.
        latents: (N, C, h, w) fp32 the pictures themselves, where terms need them.
    """

    samples: list[Sample]
    moments: dict[int, Moment] = field(default_factory=dict)
    latents: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How the pictures of one iteration are drawn: all steps, and those whose densities are kept and trained."""

    steps: list[Transition]
    trained: list[int]


class Sampling:
    """Draws chunks of pictures and replays their steps.

    Args:
        adapter: family of the pipeline.
        schedule: its forward process.
        prompts: encoded prompts.
        config: settings of the run.
        accelerator: device and autocast.

    Raises:
        ConfigError: a resolution that the model cannot draw, or a plan without a step to train.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        schedule: Schedule,
        prompts: EncodedPrompts,
        config: PrefGRPOConfig,
        accelerator: Accelerator,
    ) -> None:
        self.adapter, self.prompts, self.config, self.accelerator = adapter, prompts, config, accelerator
        self.edge = adapter.square_edge(config.resolution)
        cells = self.edge // adapter.vae_scale_factor
        self.shape: Shape = (adapter.latent_channels, cells, cells)
        self.grid: SamplingGrid = adapter.sampling_grid(schedule, config.sampling_steps, (cells, cells))
        default = "flow_sde" if self.grid.kind == "flow" else "ddim"
        self.sampler = default if config.sampler == "default" else config.sampler
        self.kept = DTYPES[config.latent_dtype]
        self.guided = config.guidance_scale > 1
        self.empty = prompts.unconditional() if self.guided else {}
        self._require_trainable()

    # --- which steps ---------------------------------------------------------------------------------------------

    def plan(self, iteration: int) -> Plan:
        """The steps of an iteration: a window of stochastic ones, some of which are trained; none for ``matching``."""
        config = self.config
        if config.objective == "matching":
            return Plan(transitions(self.grid, self.sampler, 0.0), [])
        eligible = self._eligible()
        width = min(config.sde_window or eligible, eligible)
        places = eligible - width + 1
        if config.sde_window_moves == "sliding":
            start = iteration // config.sde_window_stay % places
        else:
            start = keyed_seed(config.seed, iteration, "window") % places
        window = list(range(start, start + width))
        steps = transitions(self.grid, self.sampler, config.noise_level, stochastic=window)
        count = max(1, round(config.timestep_fraction * width))
        order = keyed_permutation(width, config.seed, iteration, "trained steps")
        return Plan(steps, sorted(window[i] for i in order[:count]))

    def _eligible(self) -> int:
        """How many steps may be stochastic: all but the final ones."""
        config = self.config
        return len(self.grid) - (FINAL_STEPS[self.grid.kind] if config.final_steps is None else config.final_steps)

    def _require_trainable(self) -> None:
        """Refuse now what an iteration would refuse once its window gets there."""
        if self.config.objective == "matching":
            return
        eligible = self._eligible()
        if eligible < 1:
            raise ConfigError(
                f"of {len(self.grid)} sampling steps the last {len(self.grid) - eligible} are deterministic, so none "
                "is left to train: raise sampling_steps or lower final_steps."
            )
        transitions(self.grid, self.sampler, self.config.noise_level, stochastic=range(eligible))

    # --- one call of a network -----------------------------------------------------------------------------------

    def conditioning(self, samples: Sequence[Sample], device: torch.device, *, guided: bool | None = None) -> Told:
        """What the network is told: prompt tensors, with guidance behind those of the empty branch, and sizes.

        Args:
            samples: N pictures.
            device: where the tensors go.
            guided: whether both branches are asked; None means as the rollouts are.
        """
        guided = self.guided if guided is None else guided
        told = self.prompts.batch([sample.prompt for sample in samples])
        if guided:
            told = {n: torch.cat([self.empty[n].expand(len(samples), *v.shape[1:]), v]) for n, v in told.items()}
        size = torch.tensor([[self.edge, self.edge, 0, 0, self.edge, self.edge]], dtype=torch.float32)
        count = len(samples) * (2 if guided else 1)
        return {name: value.to(device) for name, value in told.items()}, size.expand(count, -1).to(device)

    def call(self, model: nn.Module, x: Tensor, time: Tensor, told: Told) -> Tensor:
        """One call of a network, (M, C, h, w) fp32 for M states, their times (M,) and what it is told."""
        with self.accelerator.autocast():
            dtype = DTYPES[self.config.mixed_precision]
            return self.adapter.predict(model, x, time, *told, dtype=dtype).float()

    def predict(self, model: nn.Module, x: Tensor, step: Transition, told: Told) -> Tensor:
        """Output of a network for states (N, C, h, w), guided in fp32; both branches run in one call."""
        inputs = torch.cat([x, x]) if self.guided else x
        out = self.call(model, inputs, x.new_full((len(inputs),), step.time, dtype=torch.float32), told)
        if not self.guided:
            return out
        empty, full = out.chunk(2)
        if self.config.guidance_gradient == "conditional":
            empty = empty.detach()
        return empty + self.config.guidance_scale * (full - empty)

    # --- drawing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, model: nn.Module, samples: list[Sample], plan: Plan) -> tuple[Chunk, Tensor]:
        """Draw pictures.

        Returns:
            What training needs of them, and their latents (N, C, h, w) fp32.
        """
        config, device = self.config, self.accelerator.device
        told = self.conditioning(samples, device)
        noise = [
            keyed_normal(self.shape, config.seed, s.group, 0 if config.shared_noise else s.member, "initial noise")
            for s in samples
        ]
        chunk, x = Chunk(samples), self._keep(torch.stack(noise).to(device))
        for step in plan.steps:
            mean = step.mean(x, self.predict(model, x.float(), step, told))
            # rounded to what is kept before its density is found: the replay starts from the same numbers
            x_next = self._keep(step.draw(mean, self._noise(samples, step, device)))
            if step.index in plan.trained:
                density = step.log_density(x_next, mean, config.log_prob)
                chunk.moments[step.index] = Moment(density, x, x_next, mean if config.ratio_norm else None)
            x = x_next
        return chunk, x.float()

    def _keep(self, x: Tensor) -> Tensor:
        return x.to(self.kept)

    def _noise(self, samples: list[Sample], step: Transition, device: torch.device) -> Tensor | None:
        if step.std == 0:
            return None
        keys = [(self.config.seed, s.group, s.member, "step", step.index) for s in samples]
        return torch.stack([keyed_normal(self.shape, *key) for key in keys]).to(device)
