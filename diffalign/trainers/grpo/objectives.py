"""What stands for a picture's log-density in the ratio: the steps that drew it, or how well it is denoised.

A picture is learnt from in several terms: one for each trained sampling step, or one for each noise level at which it
is denoised. A term asks the network again about the same inputs, with gradients and with other weights, so whatever it
needs is kept or keyed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...diffusion import Transition, drift
from ...objectives import step_kl
from ...randomness import keyed_generator, keyed_normal
from ..noise_levels import TimestepSampler
from .rollouts import Chunk, Moment, Plan, Sample, Sampling, Told

if TYPE_CHECKING:
    from ...diffusion import Schedule

#: (drift (N,), tau, width) of a step, see :func:`diffalign.objectives.grpo_loss`.
Normalisation = tuple[Tensor, float, float]
DRAWS = 4  # of noise levels, where nothing else is asked
BUCKETS = 4  # parts of the noise levels that get metrics of their own


class Term(ABC):
    """One term of a chunk of N pictures.

    Attributes:
        places: (N,) which bucket of the metrics its values belong to: the step, or the timestep of each picture.
    """

    places: Tensor

    @abstractmethod
    def predict(self, model: nn.Module) -> Tensor:
        """Output of a network (N, C, h, w) for the inputs of this term."""

    @abstractmethod
    def log_density(self, prediction: Tensor) -> tuple[Tensor, Normalisation | None]:
        """(N,) what stands for the log-density, and how RatioNorm would normalise its ratio."""

    @abstractmethod
    def kl(self, prediction: Tensor, reference: Tensor) -> Tensor:
        """(N,) how far the prediction is from the reference's."""

    def stats(self, log_density: Tensor) -> dict[str, Tensor]:
        """What else is logged, (N,) by name."""
        return {}


class Objective(ABC):
    """How the terms of pictures are made.

    Attributes:
        metrics: number of places of the terms, and of buckets.
    """

    metrics: tuple[int, int]

    @abstractmethod
    def indices(self, plan: Plan) -> list[int]:
        """Names of the terms of each picture of a rollout."""

    @abstractmethod
    def conditioning(self, chunk: Chunk, device: torch.device) -> Told:
        """What the network is told in all terms of a chunk."""

    @abstractmethod
    def term(self, plan: Plan, chunk: Chunk, index: int, told: Told) -> Term:
        """One of them."""

    @abstractmethod
    def remember(self, model: nn.Module, chunk: Chunk, latents: Tensor, plan: Plan) -> None:
        """Keep what the terms of a chunk need that was just drawn; without gradients.

        Args:
            model: the policy that drew it.
            chunk: gets what is kept.
            latents: (N, C, h, w) the pictures.
            plan: how they were drawn.
        """


# --- the steps that drew the picture -------------------------------------------------------------------------------


class StepObjective(Objective):
    """Densities of sampling steps (DDPO, 2305.13301; Flow-GRPO, 2505.05470); drawing has kept them already."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.metrics = (sampling.config.sampling_steps, sampling.config.sampling_steps)

    def remember(self, model: nn.Module, chunk: Chunk, latents: Tensor, plan: Plan) -> None:
        return

    def indices(self, plan: Plan) -> list[int]:
        return plan.trained

    def conditioning(self, chunk: Chunk, device: torch.device) -> Told:
        return self.sampling.conditioning(chunk.samples, device)

    def term(self, plan: Plan, chunk: Chunk, index: int, told: Told) -> StepTerm:
        return StepTerm(self.sampling, plan.steps[index], chunk.moments[index], told)


@dataclass
class StepTerm(Term):
    """The density of one step of the sampler."""

    sampling: Sampling
    step: Transition
    moment: Moment
    told: Told

    def __post_init__(self) -> None:
        assert self.moment.x is not None and self.moment.x_next is not None
        self.x, self.x_next = self.moment.x.float(), self.moment.x_next
        self.places = torch.full((len(self.x),), self.step.index)

    def predict(self, model: nn.Module) -> Tensor:
        return self.sampling.predict(model, self.x, self.step, self.told)

    def log_density(self, prediction: Tensor) -> tuple[Tensor, Normalisation | None]:
        step, convention = self.step, self.sampling.config.log_prob
        mean = step.mean(self.x, prediction)
        normalise = None
        if self.moment.mean is not None:
            normalise = (drift(mean, self.moment.mean, step.std, convention), step.std, step.width)
        return step.log_density(self.x_next, mean, convention), normalise

    def kl(self, prediction: Tensor, reference: Tensor) -> Tensor:
        scale, std, form = self.step.prediction_scale, self.step.std, self.sampling.config.kl_form
        return step_kl(prediction, reference, scale=scale, std=std, form=form)


# --- how well the picture is denoised ------------------------------------------------------------------------------


class MatchingObjective(Objective):
    """Minus the denoising error at a few noise levels (Advantage Weighted Matching, Xue et al. 2025, 2509.25050).

    A step's density has the step's own noise as its target; a denoising error has the noise that was added to the
    picture, which depends on nothing else that happened on the way. So the gradient is far less noisy, and any sampler
    may draw the pictures. All pictures of a group share noise and timesteps, as those of a pair do in DPO.

    Args:
        sampling: draws the pictures, and calls networks.
        schedule: the forward process.
    """

    def __init__(self, sampling: Sampling, schedule: Schedule) -> None:
        self.sampling, self.schedule = sampling, schedule
        config = sampling.config
        self.draws = DRAWS if config.matching_draws is None else config.matching_draws
        self.timesteps = TimestepSampler(schedule, config)
        self.shift = sampling.adapter.time_shift((sampling.shape[1], sampling.shape[2]))
        self.metrics = (schedule.num_timesteps, BUCKETS)
        self._timestep(Sample("", 0, 0), 0)  # refuses impossible settings now, not after the first rollout

    def indices(self, plan: Plan) -> list[int]:
        return list(range(self.draws))

    def conditioning(self, chunk: Chunk, device: torch.device) -> Told:
        return self.sampling.conditioning(chunk.samples, device, guided=False)

    def term(self, plan: Plan, chunk: Chunk, index: int, told: Told) -> MatchingTerm:
        assert chunk.latents is not None
        keys = [(self.sampling.config.seed, sample.group, index, "matching noise") for sample in chunk.samples]
        noise = torch.stack([keyed_normal(self.sampling.shape, *key) for key in keys]).to(chunk.latents.device)
        timesteps = torch.tensor([self._timestep(sample, index) for sample in chunk.samples], device=noise.device)
        return MatchingTerm(self.sampling, self.schedule, chunk.latents, noise, timesteps, told)

    def _timestep(self, sample: Sample, index: int) -> int:
        generator = keyed_generator(self.sampling.config.seed, sample.group, index, "matching timestep")
        return self.timesteps.draw(generator, shift=self.shift, stratum=(index, self.draws))

    @torch.no_grad()
    def remember(self, model: nn.Module, chunk: Chunk, latents: Tensor, plan: Plan) -> None:
        chunk.latents = latents
        told = self.conditioning(chunk, latents.device)
        for index in self.indices(plan):
            term = self.term(plan, chunk, index, told)
            chunk.moments[index] = Moment(term.log_density(term.predict(model))[0])


@dataclass
class MatchingTerm(Term):
    """Minus the denoising error at one noise level of each picture."""

    sampling: Sampling
    schedule: Schedule
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    told: Told

    def __post_init__(self) -> None:
        self.places = self.timesteps

    def predict(self, model: nn.Module) -> Tensor:
        noisy = self.schedule.add_noise(self.latents, self.noise, self.timesteps)
        return self.sampling.call(model, noisy, self.schedule.time(self.timesteps), self.told)

    def log_density(self, prediction: Tensor) -> tuple[Tensor, Normalisation | None]:
        space = self.sampling.config.loss_space
        return -self.schedule.denoising_error(prediction, self.latents, self.noise, self.timesteps, space), None

    def kl(self, prediction: Tensor, reference: Tensor) -> Tensor:
        return step_kl(prediction, reference, scale=1.0, std=1.0, form="prediction")

    def stats(self, log_density: Tensor) -> dict[str, Tensor]:
        return {"error": -log_density}
