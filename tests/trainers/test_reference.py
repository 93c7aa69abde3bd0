from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from diffalign.trainers.reference import AdapterReference, FrozenReference, InitialReference, weights_hash
from tests.tiny import LATENT_SIZE, TEXT_WIDTH, tiny_sd


def predict(module: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    with torch.no_grad():
        return module(x, torch.tensor([10, 700]), torch.randn(2, 7, TEXT_WIDTH, generator=generator)).sample


@pytest.fixture
def unet() -> torch.nn.Module:
    return tiny_sd().unet.eval()


def with_lora(unet: torch.nn.Module) -> torch.nn.Module:
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    return unet


def move(unet: torch.nn.Module) -> None:
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)


def test_adapters_off_is_the_base_bit_for_bit_also_after_an_update(unet):
    base, before = predict(unet), weights_hash(unet)
    reference = AdapterReference(with_lora(unet))
    assert torch.equal(predict(unet), base)  # a fresh LoRA changes nothing
    move(unet)
    assert not torch.equal(predict(unet), base)
    with reference.use(unet) as module:
        assert torch.equal(predict(module), base)
    assert not torch.equal(predict(unet), base)
    assert reference.identity == before == weights_hash(unet, skip="lora_")


def test_adapters_come_back_after_an_error(unet):
    reference = AdapterReference(with_lora(unet))
    move(unet)
    moved = predict(unet)
    with pytest.raises(KeyError), reference.use(unet):
        raise KeyError
    assert torch.equal(predict(unet), moved)
    assert any(parameter.requires_grad for parameter in unet.parameters())


def test_dropout_of_the_base_is_off_in_every_reference_and_on_again_after_it(unet):
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    base, network = predict(unet), with_lora(unet.requires_grad_(False)).train()
    assert not torch.equal(predict(network), predict(network))
    for reference in (AdapterReference(network), InitialReference(network), FrozenReference(network)):
        with reference.use(network) as module:
            assert torch.equal(predict(module), base)
        assert network.training and all(module.training for module in network.modules())


def test_the_frozen_copy_stays_when_the_policy_moves(unet):
    unet.requires_grad_(True)
    base, reference = predict(unet), FrozenReference(unet)
    move(unet)
    with reference.use(unet) as module:
        assert torch.equal(predict(module), base)
    assert not any(parameter.requires_grad for parameter in reference.module.parameters())
    assert reference.identity != weights_hash(unet)


def test_a_half_precision_copy_keeps_the_identity_of_the_weights_it_was_made_from(unet):
    assert FrozenReference(unet, torch.bfloat16).identity == weights_hash(unet)


def test_one_changed_bit_changes_the_hash(unet):
    before = weights_hash(unet)
    with torch.no_grad():
        next(unet.parameters()).view(-1)[0].add_(1e-6)
    assert weights_hash(unet) != before
