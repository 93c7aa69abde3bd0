"""Which noise does a picture come from? DDIM inversion and ReNoise, each row of a batch to its own timestep.

A deterministic sampler walks from noise to a picture; inversion walks back. Its step from one level to a noisier one
needs the network's output at the end of the step, which is not known yet. Plain DDIM inversion takes the output for the
latents it has. ReNoise (Garibi et al. 2024, 2403.14602, section 3) steps with that, asks again with the latents it
arrived at, and steps again from the same start, R times: backward Euler, solved by fixed-point iteration. The network
is always told the timestep at the end of the step.

The walk ends at exactly the timestep that was asked for. Its latents may therefore be given to the network at that
timestep, and :attr:`Inversion.noise` is the noise that the schedule would have had to add. A grid that merely ends
nearby would mix signal and noise in a ratio that fits no timestep of the training.

A level counts from the clean picture: level 0 is x0, level t + 1 is timestep t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConfigError, DivergenceError
from .base import Schedule
from .conversions import implied_clean, implied_noise

#: predict(x, time, rows) -> network output: x (n, C, h, w), time (n,) as the network is told it, rows (n,) int64, which
#: rows of the batch these are, to pick their conditioning by.
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]

# A row diverges when its last move is this many times the smallest one before. A plateau does not: the first step of
# real networks often stands still for some iterations before it converges, and stopping there loses what they gain.
_GROWTH = 1.5
_ROUNDING = 4.0  # a relative residual below this many units of the network's precision is not asked whether it grows


@dataclass(frozen=True)
class InversionGrid:
    """The levels each row walks through.

    Args:
        levels: (N, K + 1) int64, from 0 up to t + 1; rows with fewer than K steps repeat their last level.
        counts: (N,) int64 number of steps of each row.
    """

    levels: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Inversion:
    """Noisy latents that lead to given pictures, and how well that is known.

    Args:
        latents: (N, C, h, w) x_t at each row's timestep, without gradient like everything here.
        noise: (N, C, h, w) with latents = schedule.add_noise(x0, noise, t), to rounding. It is no standard normal draw:
            its variance is well below 1 at small t.
        residual: (N,) the largest over the row's steps of |y' - y| / |y|, where y' is what one more iteration makes of
            the iterate y: how far a step is from being invertible exactly. With renoise=0 there is no iterate, and it
            is the relative length of the step itself.
        steps: (N,) int64 steps of the grid.
        evaluations: (N,) int64 network calls spent on the row.
        fell_back: (N,) whether the guard replaced the result of any of the row's steps.
    """

    latents: Tensor
    noise: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: Tensor
    fell_back: Tensor


def inversion_grid(t: Tensor, steps: int, num_timesteps: int) -> InversionGrid:
    """Evenly spaced levels from the clean picture to exactly timestep t.

    Args:
        t: (N,) int64 targets.
        steps: steps for the whole range 0..T-1; a nearer target gets its share, ceil(steps (t + 1) / T), at least 1.
        num_timesteps: T.

    Raises:
        ConfigError: ``steps`` below 1, or t that are no integers in [0, T).
    """
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number of at least 1; got {steps!r}.")
    if t.ndim != 1 or len(t) == 0 or t.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"t must hold one integer timestep per row, shape (N,); got {tuple(t.shape)} {t.dtype}.")
    t = t.long()
    if not bool(((t >= 0) & (t < num_timesteps)).all()):
        raise ConfigError(f"timesteps must lie in 0..{num_timesteps - 1}; got {t.tolist()}.")
    target = t + 1
    counts = torch.minimum(-(-steps * target // num_timesteps), target)
    place = torch.minimum(torch.arange(int(counts.max()) + 1, device=t.device), counts[:, None])
    # rounding half up in integers: steps of at least one level stay apart, and the last one is exact
    levels = (2 * target[:, None] * place + counts[:, None]) // (2 * counts[:, None])
    return InversionGrid(levels, counts)


@torch.no_grad()
def invert(
    predict: Predict,
    x0: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    steps: int = 10,
    renoise: int = 1,
    weights: Sequence[float] | None = None,
    guard: bool = True,
) -> Inversion:
    """Invert a batch of clean latents, each to its own timestep.

    Costs (renoise + 1) network calls per step of a row; a row that has arrived is no longer computed.

    Args:
        predict: the network without guidance and in eval mode (dropout would make each iteration another equation);
            called without gradient. See :data:`Predict`.
        x0: (N, C, h, w) clean scaled latents. fp64 is computed in fp64, everything else in fp32.
        t: (N,) integer timesteps in [0, T).
        schedule: of the model; epsilon, v, sample or flow. At pure noise (zero terminal SNR) every picture is a fixed
            point of a variance-preserving step, so that the last step evaluates at its start, once.
        steps: steps for the whole range, see :func:`inversion_grid`.
        renoise: fixed-point iterations R of each step after the plain one; 0 is plain DDIM (or Euler) inversion.
        weights: R + 1 weights of the network's outputs, first to last, at least 0 and summing to 1. None: for one
            iteration the mean of both (SmPO's setting), else the last alone.
        guard: watch each row of each step. Where an iterate is not finite, or the last iteration moved it half as far
            again as an earlier one (beyond rounding), the best iterate replaces the weighted result: the one that
            another iteration moves least, or plain DDIM if none is known to be better. Reported in ``fell_back``.
            False takes what comes, NaN included.

    Raises:
        ConfigError: impossible settings or shapes, or one single step to pure noise.
        DivergenceError: with ``guard``, the very first output of a step is not finite, so nothing can replace it.
    """
    shares = _checked_weights(weights, renoise)
    x0 = _checked_latents(x0, t)
    grid = inversion_grid(t.cpu(), steps, schedule.num_timesteps)
    walk = _Walk(predict, schedule, x0)
    walk.check_reachable(grid)
    z = x0.clone()
    residual = z.new_zeros(len(z))
    fell_back = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    evaluations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for k in range(1, grid.levels.shape[1]):
        active, end = grid.counts >= k, grid.levels[:, k]
        terminal = active & walk.is_terminal(end)
        for rows, hop in walk.hops(active & ~terminal, grid.levels[:, k - 1], end):
            step = walk.fixed_point(z[rows], hop, shares, guard=guard)
            z[rows] = step.latents
            residual[rows] = torch.maximum(residual[rows], step.residual)  # keeps NaN
            fell_back[rows] |= step.fell_back
            evaluations[rows] += len(shares)
        for rows, hop in walk.hops(terminal, grid.levels[:, k - 1], end):
            z[rows] = walk.to_pure_noise(z[rows], hop, guard=guard)
            evaluations[rows] += 1
    a, b = walk.scales(grid.levels[:, -1])
    return Inversion(z, (z - a * x0) / b, residual, grid.counts.to(z.device), evaluations, fell_back)


@torch.no_grad()
def denoise(predict: Predict, x_t: Tensor, t: Tensor, schedule: Schedule, *, steps: int = 10) -> Tensor:
    """Walk back down the grid of :func:`invert` with plain DDIM (flow models: Euler): the other half of a round trip.

    Args:
        predict, t, schedule, steps: as in :func:`invert`.
        x_t: (N, C, h, w) noisy latents, each row at its own timestep.

    Returns:
        (N, C, h, w) clean latents, fp64 for fp64 and fp32 otherwise, without gradient.

    Raises:
        ConfigError: impossible settings or shapes.
    """
    x = _checked_latents(x_t, t).clone()
    grid = inversion_grid(t.cpu(), steps, schedule.num_timesteps)
    walk = _Walk(predict, schedule, x)
    for k in range(grid.levels.shape[1] - 1, 0, -1):
        for rows, hop in walk.hops(grid.counts >= k, grid.levels[:, k], grid.levels[:, k - 1]):
            x[rows] = walk.down(x[rows], hop)
    return x


@dataclass(frozen=True)
class _Hop:
    """Which rows step from which level to which: rows on the latents' device, levels on the CPU."""

    rows: Tensor
    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class _Step:
    latents: Tensor
    residual: Tensor
    fell_back: Tensor


class _Walk:
    """Steps between levels. Coefficients are computed in fp64, latents in the dtype of ``like``."""

    def __init__(self, predict: Predict, schedule: Schedule, like: Tensor) -> None:
        self.predict, self.schedule, self.kind = predict, schedule, schedule.prediction_type
        self.dtype, self.device, self.shape = like.dtype, like.device, (-1, *[1] * (like.ndim - 1))
        self.signal, self.noise = schedule.levels(torch.float64)
        self.precision = 0.0

    def hops(self, mask: Tensor, start: Tensor, end: Tensor) -> Iterator[tuple[Tensor, _Hop]]:
        """The rows of ``mask`` together, or nothing when there are none."""
        rows = mask.nonzero().squeeze(1)
        if len(rows):
            on_device = rows.to(self.device)
            yield on_device, _Hop(on_device, start[rows], end[rows])

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of each row's level, ready to multiply latents."""
        return self._ready(self.signal[level]), self._ready(self.noise[level])

    def is_terminal(self, level: Tensor) -> Tensor:
        """Rows that arrive at pure noise of a variance-preserving process, where eps = x whatever the network says."""
        return (self.signal[level] == 0) & (self.kind != "flow")

    def check_reachable(self, grid: InversionGrid) -> None:
        if bool((self.is_terminal(grid.levels[:, -1]) & (grid.counts == 1)).any()):
            raise ConfigError(
                "the last timestep of a zero-terminal-SNR schedule is pure noise and cannot be reached in one step, "
                "which would ask the network about the clean picture. Use steps >= 2, or lower timesteps."
            )

    def fixed_point(self, z: Tensor, hop: _Hop, shares: Sequence[float], *, guard: bool) -> _Step:
        """z' = alpha z + omega d, with d at the end of the hop: the noise, or a flow model's velocity."""
        alpha, omega = self._inverse_step(hop)
        a, b = self.scales(hop.end)
        iterates, directions = [z], []
        for _ in shares:
            d = self._output(iterates[-1], hop.end, hop.rows)
            if self.kind != "flow":
                d = implied_noise(self.kind, d, iterates[-1], a, b)
            directions.append(d)
            iterates.append(alpha * z + omega * d)
        mean = sum(share * d for share, d in zip(shares, directions, strict=True) if share > 0)
        moved = torch.stack([_norm(new - old) for old, new in pairwise(iterates)])
        length = torch.stack([_norm(y) for y in iterates[:-1]])
        residual = moved / length.clamp_min(torch.finfo(z.dtype).tiny)
        step = _Step(alpha * z + omega * mean, residual[-1], torch.zeros_like(hop.rows, dtype=torch.bool))
        return self._guarded(step, torch.stack(iterates), moved, residual, hop) if guard else step

    def to_pure_noise(self, z: Tensor, hop: _Hop, *, guard: bool) -> Tensor:
        """The last step where a is 0 at its end: the noise that the network sees at the start."""
        noise = implied_noise(self.kind, self._output(z, hop.start, hop.rows), z, *self.scales(hop.start))
        if guard:
            self._require_finite(_norm(noise).isfinite(), hop.rows, hop.start)
        return noise

    def down(self, x: Tensor, hop: _Hop) -> Tensor:
        """One step of DDIM: the clean latent and the noise seen at the start, mixed as at the end."""
        a, b = self.scales(hop.start)
        a_end, b_end = self.scales(hop.end)
        out = self._output(x, hop.start, hop.rows)
        return a_end * implied_clean(self.kind, out, x, a, b) + b_end * implied_noise(self.kind, out, x, a, b)

    def _inverse_step(self, hop: _Hop) -> tuple[Tensor, Tensor]:
        """alpha and omega of each row; no noise-to-signal ratio is divided by, so that any end will do."""
        a, b, a_end, b_end = (table[level] for level in (hop.start, hop.end) for table in (self.signal, self.noise))
        alpha = torch.ones_like(a) if self.kind == "flow" else a_end / a
        return self._ready(alpha), self._ready(b_end - alpha * b)

    def _ready(self, coefficient: Tensor) -> Tensor:
        return coefficient.to(self.device, self.dtype).view(self.shape)

    def _output(self, x: Tensor, level: Tensor, rows: Tensor) -> Tensor:
        """The network's output at ``level``, in the latents' dtype."""
        out = self.predict(x, self.schedule.time(level - 1).to(self.device), rows)
        if out.shape != x.shape:
            raise ConfigError(
                f"predict must return one output of the latents' shape {tuple(x.shape)}; got {tuple(out.shape)}."
            )
        self.precision = max(torch.finfo(out.dtype).eps, torch.finfo(x.dtype).eps)
        return out.detach().to(x)

    def _guarded(self, step: _Step, iterates: Tensor, moved: Tensor, residual: Tensor, hop: _Hop) -> _Step:
        """Replace the rows whose iteration failed.

        Walking down from iterate y_r gives the start back up to |y_{r+1} - y_r| / alpha, so the best iterate is the one
        that moves least. The last one's move is not known; it is taken as the best unless the moves grow.
        """
        finite = moved.isfinite()
        self._require_finite(finite[0], hop.rows, hop.end)
        if len(moved) == 1:
            return step
        known = torch.where(finite, moved, math.inf)
        grew = (known[-1] > _GROWTH * known[:-1].amin(0)) & (residual[-1] > _ROUNDING * self.precision)
        failed = ~finite.all(0) | grew
        best = 1 + known[1:].argmin(0)  # 1 is plain DDIM, which is also the choice where no move is known
        each = torch.arange(len(hop.rows), device=self.device)
        chosen = torch.where(finite[best, each], residual[best, each], math.inf)
        return _Step(
            torch.where(failed.view(self.shape), iterates[best, each], step.latents),
            torch.where(failed, chosen, step.residual),
            failed,
        )

    @staticmethod
    def _require_finite(finite: Tensor, rows: Tensor, level: Tensor) -> None:
        if not bool(finite.all()):
            bad = zip(rows[~finite].tolist(), level[~finite.cpu()].tolist(), strict=True)
            where = ", ".join(f"row {row} at t={at - 1}" for row, at in bad)
            raise DivergenceError(
                f"inversion met an output of the network that is not finite ({where}). Check the weights and the "
                "precision (bf16 instead of fp16); guard=False returns the NaN."
            )


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _checked_weights(weights: Sequence[float] | None, renoise: int) -> tuple[float, ...]:
    if not isinstance(renoise, int) or renoise < 0:
        raise ConfigError(f"renoise must be a whole number of at least 0; got {renoise!r}.")
    if weights is None:
        return (0.5, 0.5) if renoise == 1 else (*[0.0] * renoise, 1.0)
    shares = tuple(float(w) for w in weights)
    good = len(shares) == renoise + 1 and all(math.isfinite(w) and w >= 0 for w in shares)
    if not good or abs(math.fsum(shares) - 1) > 1e-6:
        raise ConfigError(
            f"weights must be renoise + 1 = {renoise + 1} numbers of at least 0 that sum to 1; got {list(shares)}."
        )
    return shares


def _checked_latents(x: Tensor, t: Tensor) -> Tensor:
    if x.ndim < 2 or not x.is_floating_point() or t.shape != x.shape[:1]:
        raise ConfigError(
            "latents must be floating point, (N, C, h, w), with one timestep per row; got "
            f"{tuple(x.shape)} {x.dtype} and timesteps {tuple(t.shape)}."
        )
    if not bool(x.isfinite().all()):
        raise ConfigError(
            "latents must be finite; these hold NaN or infinity. Check the pictures and the VAE's precision."
        )
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
