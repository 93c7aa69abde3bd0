"""Self-NPO: a negative model from prompts alone, taught by the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..data.rows import prompt_hash
from ..diffusion.truncated import descent, renoise, truncated_walk
from ..errors import ConfigError
from ..randomness import keyed_normal, keyed_seed, keyed_uniform
from .batches import Draw, RowStream
from .config import SelfNPOConfig
from .policy import DTYPES
from .prompt_loop import PromptLoop


class SelfNPOTrainer(PromptLoop):
    """Truncated diffusion fine-tuning (Self-NPO, arXiv:2505.11777): prompts only, neither images nor preferences.

    The result is no better model but a negative one, for :func:`diffalign.guidance.negative_guidance`. See
    :mod:`diffalign.diffusion.truncated` for what a step does, and docs/methods/selfnpo.md for what to expect.

    Args:
        pipeline, config, accelerator, base_model: see :class:`.loop.TrainingLoop`.
        train_dataset: prompts, or what :func:`diffalign.trainers.prompts.load_prompts` accepts.
    """

    method = "selfnpo"
    config_class = SelfNPOConfig
    config: SelfNPOConfig

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        config: SelfNPOConfig,
        train_dataset: Any,
        accelerator: Accelerator | None = None,
        *,
        base_model: str | None = None,
    ) -> None:
        super().__init__(pipeline, config, train_dataset, accelerator, base_model=base_model)
        last = self.schedule.num_timesteps - 1
        self.highest = last if config.max_timestep is None else config.max_timestep
        if not 1 <= self.highest <= last or config.min_timestep > self.highest:
            raise ConfigError(
                f"expected min_timestep <= max_timestep and max_timestep in 1..{last}; got min_timestep="
                f"{config.min_timestep} and max_timestep={self.highest}."
            )
        self.encode(self.dataset.texts)
        self.stream = RowStream([(1,)] * len(self.dataset), self.global_batch, config.seed)
        edge = self.adapter.square_edge(config.resolution)
        cells = edge // self.adapter.vae_scale_factor
        self.latent_shape = (self.adapter.latent_channels, cells, cells)
        self.size_ids = torch.tensor([[edge, edge, 0, 0, edge, edge]], dtype=torch.float32)
        self.build_policy(temporary_reference=config.teacher == "ema")
        self.start(self.steps_of(len(self.dataset)))
        self.average: MovingTeacher | None = None
        if config.teacher == "ema":
            decay = 0.999 if config.teacher_decay is None else config.teacher_decay
            self.average = MovingTeacher(self.denoiser, self.parameters, decay)
            self.accelerator.register_for_checkpointing(self.average)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"teacher": self.config.teacher}

    # --- a step --------------------------------------------------------------------------------------------------

    def optimizer_step(self) -> dict[str, float]:
        accelerator, config = self.accelerator, self.config
        share = self.global_batch // accelerator.num_processes
        first = accelerator.process_index * share
        draws = self.stream.step(self.step)[first : first + share]
        torch.manual_seed(keyed_seed(config.seed, self.step, accelerator.process_index, "dropout"))
        losses: list[tuple[list[str], Tensor]] = []
        for start in range(0, share, config.batch_size):
            batch = self._draw(draws[start : start + config.batch_size])
            target, noisy = self._teach(batch)
            last = start + config.batch_size >= share
            with nullcontext() if last else accelerator.no_sync(self.model):
                seen = self.schedule.to_x0(self._predict(self.model, noisy, batch.s, batch.told), noisy, batch.s)
                loss = self._loss(seen - target, batch.s)
                # the gradient is the mean over the global batch, and DDP averages over processes
                accelerator.backward(loss.sum() * accelerator.num_processes / self.global_batch)
            losses.append((batch.texts, loss.detach()))
            error = (seen.detach() - target).square().flatten(1).mean(1)
            self.metrics.add({"loss": loss.detach(), "error/x0": error}, batch.s)
        self.require_finite(losses)
        applied = self.apply_gradients()
        if self.average is not None:
            self.average.update()
        return self.metrics.reduce(accelerator) | applied

    def _draw(self, draws: Sequence[Draw]) -> PromptBatch:
        """Every random choice about these prompts, keyed by prompt and epoch."""
        config, device = self.config, self.accelerator.device
        texts = [self.dataset.texts[draw.example] for draw in draws]
        keys = [(config.seed, draw.epoch, prompt_hash(text)) for draw, text in zip(draws, texts, strict=True)]
        high = self.highest
        stops, ends = [], []
        for key in keys:
            t = int(keyed_uniform(*key, "stop") * high)  # below high, so that there is an s above it
            low = max(t + 1, config.min_timestep)
            stops.append(t)
            ends.append(low + int(keyed_uniform(*key, "timestep") * (high - low + 1)))
        prompts = _on(self.encoded.batch(texts), device)
        empty = _on({n: v.expand(len(texts), *v.shape) for n, v in self.encoded.unconditional().items()}, device)
        dropped = torch.tensor([keyed_uniform(*key, "negative") < config.negative_share for key in keys], device=device)
        told = {n: torch.where(dropped.view(-1, *[1] * (v.ndim - 1)), empty[n], v) for n, v in prompts.items()}

        def noise(purpose: str) -> Tensor:
            return torch.stack([keyed_normal(self.latent_shape, *key, purpose) for key in keys]).to(device)

        return PromptBatch(
            texts,
            torch.tensor(stops, device=device),
            torch.tensor(ends, device=device),
            noise("start"),
            noise("noise"),
            prompts,
            empty,
            told,
        )

    @torch.no_grad()
    def _teach(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """The clean latents that the teacher sees, and the noisier ones that the student gets; (B, C, h, w) fp32."""
        times = descent(batch.t, self.config.truncation_steps, self.schedule.num_timesteps)
        with self._teacher() as module:
            walk = truncated_walk(
                lambda x, time, rows: self._guided(module, x, time, batch, rows), batch.start, times, self.schedule
            )
        return walk.clean, renoise(walk.latents, batch.noise, batch.t, batch.s, self.schedule)

    @contextmanager
    def _teacher(self) -> Iterator[nn.Module]:
        assert self.reference is not None
        with self.reference.use(self.model) if self.average is None else self.average.use() as module:
            yield module

    def _guided(self, module: nn.Module, x: Tensor, time: Tensor, batch: PromptBatch, rows: Tensor) -> Tensor:
        """u + g (c - u), fp32; a branch whose weight is 0 is not run."""
        g = self.config.teacher_guidance
        prompt, empty = ({n: v[rows] for n, v in told.items()} for told in (batch.prompts, batch.empty))
        if g in (0, 1):
            return self._call(module, x, time, prompt if g else empty).float()
        both = {n: torch.cat([prompt[n], empty[n]]) for n in prompt}
        output = self._call(module, torch.cat([x, x]), torch.cat([time, time]), both)
        conditional, unconditional = output.float().chunk(2)
        return unconditional + g * (conditional - unconditional)

    def _predict(self, module: nn.Module, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        return self._call(module, x, self.schedule.time(t), told)

    def _call(self, module: nn.Module, x: Tensor, time: Tensor, told: dict[str, Tensor]) -> Tensor:
        sizes = self.size_ids.expand(len(x), 6).to(x.device)
        with self.accelerator.autocast():
            dtype = DTYPES[self.config.mixed_precision]
            return self.adapter.predict(module, x, time, told, sizes, dtype=dtype)

    def _loss(self, difference: Tensor, s: Tensor) -> Tensor:
        """(B,) from the difference of clean latents, carried into ``loss_space``."""
        config = self.config
        if config.loss_space not in ("default", "x0"):
            x0 = self.schedule.error_weight(s, "x0")
            tiny = torch.finfo(x0.dtype).tiny
            factor = (self.schedule.error_weight(s, config.loss_space) / x0.clamp_min(tiny)).sqrt()
            difference = difference * torch.where(x0 > 0, factor, 0.0).view(-1, *[1] * (difference.ndim - 1))
        if config.loss == "mse":
            return difference.square().flatten(1).mean(1)
        c = 1e-3 if config.huber_c is None else config.huber_c
        return ((difference.square() + c * c).sqrt() - c).flatten(1).mean(1)


@dataclass(frozen=True)
class PromptBatch:
    """B prompts and every random choice about them.

    Args:
        texts: the prompts.
        t, s: (B,) int64: where the teacher stops, and the higher timestep that the student is trained on.
        start: (B, C, h, w) noise that the teacher starts from.
        noise: (B, C, h, w) noise that is added to what it leaves.
        prompts, empty: tensors of the prompts and of the unconditional branch, (B, ...) by name.
        told: what the student is told: the prompt, or for ``negative_share`` of the rows the unconditional branch's.
    """

    texts: list[str]
    t: Tensor
    s: Tensor
    start: Tensor
    noise: Tensor
    prompts: dict[str, Tensor]
    empty: dict[str, Tensor]
    told: dict[str, Tensor]


class MovingTeacher:
    """Exponential moving average of the student: average <- decay average + (1 - decay) student.

    diffusers' EMAModel is another rule: it lets the decay grow from 0.1, with which a teacher would follow the
    student's first steps at once.

    Args:
        denoiser: the student, unwrapped.
        parameters: those of its weights that are trained.
        decay: below 1.
    """

    def __init__(self, denoiser: nn.Module, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.denoiser, self.parameters, self.decay = denoiser, list(parameters), decay
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """After each step of the student."""
        torch._foreach_lerp_(self.shadow, [parameter.detach() for parameter in self.parameters], 1 - self.decay)

    @contextmanager
    def use(self) -> Iterator[nn.Module]:
        """The denoiser with the average in place of its weights, without dropout."""
        self._exchange()
        self.denoiser.eval()
        try:
            yield self.denoiser
        finally:
            self.denoiser.train()
            self._exchange()

    def _exchange(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.shadow[i] = self.shadow[i], parameter.data

    def state_dict(self) -> dict[str, Any]:
        """For accelerate's checkpoints."""
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, theirs in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(theirs)


def _on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
