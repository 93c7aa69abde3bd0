"""Means over the rows of an optimizer step."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator

from diffalign.trainers.metrics import MetricAccumulator

NAMES = ("loss", "rewards/accuracies", "error/winner")


def _rows(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(count, generator=generator) * 10**i for i, name in enumerate(NAMES)}
    return values, torch.randint(0, 1000, (count,), generator=generator)


def _add(accumulator: MetricAccumulator, rows: slice, values: dict, timesteps: torch.Tensor) -> None:
    accumulator.add({name: value[rows] for name, value in values.items()}, timesteps[rows])


def test_accumulation_of_four_equals_a_batch_of_four_to_the_last_bit():
    values, timesteps = _rows(8)
    whole, parts = MetricAccumulator(), MetricAccumulator()
    whole.add(values, timesteps)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 8)):  # unequal micro-batches too
        _add(parts, rows, values, timesteps)
    expected = whole.reduce()
    assert parts.reduce() == expected
    assert expected["loss"] == math.fsum(values["loss"].double().tolist()) / 8


def test_it_is_not_the_last_micro_batch_nor_the_mean_of_means():
    accumulator = MetricAccumulator(buckets=0)
    accumulator.add({"loss": torch.tensor([1.0])}, torch.tensor([0]))
    accumulator.add({"loss": torch.tensor([4.0, 4.0, 4.0])}, torch.tensor([0, 0, 0]))
    assert accumulator.reduce() == {"loss": 3.25}


def test_sums_are_exact_where_fp32_is_not():
    accumulator = MetricAccumulator(buckets=0)
    accumulator.add({"loss": torch.tensor([1e8, 1.0, -1e8])}, torch.zeros(3, dtype=torch.long))
    assert accumulator.reduce() == {"loss": 1 / 3}


def test_reduce_empties():
    accumulator = MetricAccumulator()
    accumulator.add(*_rows(3))
    accumulator.reduce()
    assert accumulator.reduce() == {}
    _add(accumulator, slice(0, 2), *_rows(3, seed=1))
    fresh = MetricAccumulator()
    _add(fresh, slice(0, 2), *_rows(3, seed=1))
    assert accumulator.reduce() == fresh.reduce()


def test_timestep_buckets_hold_their_own_rows_and_empty_ones_are_absent():
    accumulator = MetricAccumulator()
    timesteps = torch.tensor([0, 249, 250, 999])
    accumulator.add({"rewards/accuracies": torch.tensor([1.0, 0.0, 1.0, 0.5]), "loss": torch.ones(4)}, timesteps)
    assert accumulator.reduce() == {
        "loss": 1.0,
        "rewards/accuracies": 0.625,
        "timesteps/0-249/rewards/accuracies": 0.5,
        "timesteps/250-499/rewards/accuracies": 1.0,
        "timesteps/750-999/rewards/accuracies": 0.5,
    }


@pytest.mark.parametrize(("total", "buckets"), [(1000, 4), (1000, 3), (50, 4), (7, 7)])
def test_buckets_divide_all_timesteps(total: int, buckets: int):
    accumulator = MetricAccumulator(total, buckets, bucketed=("loss",))
    everything = torch.arange(total)
    accumulator.add({"loss": everything.float()}, everything)
    ranges = {name.split("/")[1] for name in accumulator.reduce() if name.startswith("timesteps/")}
    covered = sorted(t for part in ranges for t in range(int(part.split("-")[0]), int(part.split("-")[1]) + 1))
    assert len(ranges) == buckets and covered == list(range(total))


def test_a_value_that_only_some_rows_have_is_the_mean_of_those():
    accumulator = MetricAccumulator(buckets=0)
    accumulator.add({"loss": torch.tensor([1.0]), "extra": torch.tensor([5.0])}, torch.tensor([0]))
    accumulator.add({"loss": torch.tensor([3.0])}, torch.tensor([0]))
    assert accumulator.reduce() == {"extra": 5.0, "loss": 2.0}


def test_nan_and_infinities_show():
    accumulator = MetricAccumulator(buckets=0)
    accumulator.add({"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([math.inf, -math.inf])}, torch.zeros(2))
    result = accumulator.reduce()
    assert math.isnan(result["a"]) and math.isnan(result["b"])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="loss must have one value per row"):
        MetricAccumulator().add({"loss": torch.tensor(1.0)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="buckets"):
        MetricAccumulator(num_timesteps=2, buckets=4)


def _process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    # They find each other by a file: a port that was free may be taken by the time it is used.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    values, timesteps = _rows(5)
    accumulator = MetricAccumulator()
    _add(accumulator, slice(0, 5) if rank == 0 else slice(5, 5), values, timesteps)  # rank 1 has no row at all
    results = [accumulator.reduce(accelerator)]
    _add(accumulator, slice(0, 2) if rank == 0 else slice(2, 5), values, timesteps)
    results.append(accumulator.reduce(accelerator))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    single = MetricAccumulator()
    single.add(*_rows(5))
    expected = single.reduce()
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == [expected, expected]
