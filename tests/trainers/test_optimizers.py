"""Optimizers do one known step; schedules count optimizer steps and nothing else."""

from __future__ import annotations

import sys

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.trainers.config import DPOConfig
from diffalign.trainers.optimizers import SCHEDULES, build_optimizer, build_schedule


def _parameter(size: int = 4) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(1.0, 2.0, size))


def _one_step(config: DPOConfig, size: int = 4) -> torch.Tensor:
    parameter = _parameter(size)
    optimizer = build_optimizer([parameter], config)
    parameter.grad = torch.ones(size)
    optimizer.step()
    return parameter.detach()


def test_adamw_takes_its_settings():
    config = DPOConfig(learning_rate=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1.0)
    # bias-corrected moments are 1 after one unit gradient: step = lr * 1 / (1 + epsilon), after decay by lr * wd
    torch.testing.assert_close(_one_step(config), _parameter().detach() * (1 - 0.1 * 0.5) - 0.1 / 2)
    group = build_optimizer([_parameter()], config).param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1.0, 0.1)


def test_adafactor_keeps_the_learning_rate_given():
    config = DPOConfig(optimizer="adafactor", learning_rate=0.1, weight_decay=0.0)
    torch.testing.assert_close(_one_step(config), _parameter().detach() - 0.1)  # not scaled by the parameter's size
    group = build_optimizer([_parameter()], config).param_groups[0]
    assert not group["relative_step"] and not group["scale_parameter"]
    decayed = _one_step(DPOConfig(optimizer="adafactor", learning_rate=0.1, weight_decay=0.5))
    torch.testing.assert_close(decayed, _parameter().detach() * (1 - 0.1 * 0.5) - 0.1)


def test_adamw_8bit_steps_like_adamw():
    pytest.importorskip("bitsandbytes")
    eight = _one_step(DPOConfig(optimizer="adamw_8bit", learning_rate=0.01), size=8192)
    full = _one_step(DPOConfig(learning_rate=0.01), size=8192)
    torch.testing.assert_close(eight, full, rtol=0, atol=2e-4)
    assert (eight - _parameter(8192).detach()).abs().min() > 5e-3


def test_adamw_8bit_without_bitsandbytes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"diffalign\[bnb\]"):
        build_optimizer([_parameter()], DPOConfig(optimizer="adamw_8bit"))


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'adafactor'"):
        build_optimizer([_parameter()], DPOConfig(optimizer="adafacter"))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer([], DPOConfig())


def _rates(config: DPOConfig, total: int) -> list[float]:
    optimizer = build_optimizer([_parameter()], config)
    schedule = build_schedule(optimizer, config, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_warm_up_counts_optimizer_steps():
    rates = _rates(DPOConfig(learning_rate=1.0, warmup_steps=4), 8)
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_cosine_and_linear_reach_zero_at_the_end():
    for name in ("cosine", "linear"):
        rates = _rates(DPOConfig(learning_rate=1.0, lr_schedule=name), 11)
        assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.11


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_known_schedule_runs_and_resumes(name: str):
    config = DPOConfig(learning_rate=1e-3, lr_schedule=name, warmup_steps=0 if name == "constant" else 2)
    whole = _rates(config, 6)
    optimizer = build_optimizer([_parameter()], config)
    schedule = build_schedule(optimizer, config, 6)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    states = optimizer.state_dict(), schedule.state_dict()
    optimizer = build_optimizer([_parameter()], config)
    schedule = build_schedule(optimizer, config, 6)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    rest = []
    for _ in range(3):
        rest.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rest == whole[3:]


def test_bad_schedules_are_refused_with_advice(caplog):
    optimizer = build_optimizer([_parameter()], DPOConfig())
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        build_schedule(optimizer, DPOConfig(lr_schedule="cosin"), 10)
    with pytest.raises(ConfigError, match="constant_with_warmup"):
        build_schedule(optimizer, DPOConfig(lr_schedule="constant", warmup_steps=5), 10)
    with pytest.raises(ConfigError, match="0 or more"):
        build_schedule(optimizer, DPOConfig(warmup_steps=-1), 10)
    slow = DPOConfig(lr_schedule="polynomial", learning_rate=1e-8)
    with pytest.raises(ConfigError, match="polynomial"):
        build_schedule(build_optimizer([_parameter()], slow), slow, 10)
    build_schedule(optimizer, DPOConfig(warmup_steps=20), 10)
    assert "never reaches its peak" in caplog.text
