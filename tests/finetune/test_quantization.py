"""Frozen weights in few bits, on a CPU: how near they are, what stays whole, and what gradients do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from megaprot.common.errors import InputError
from megaprot.finetune.quantization import Bits, plain, quantize_frozen

pytest.importorskip("bitsandbytes")


def tower() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 5))


@pytest.mark.parametrize(("bits", "nearness"), [("8bit", 0.02), ("4bit", 0.15)])
def test_outputs_and_weights_stay_near_those_of_whole_weights(bits: Bits, nearness: float) -> None:
    whole, few = tower().requires_grad_(False), tower().requires_grad_(False)
    quantize_frozen(few, bits)
    inputs = torch.randn(10, 64)
    error = (few(inputs) - whole(inputs)).norm() / whole(inputs).norm()
    assert 0 < error < nearness
    for place in (0, 2):
        weight = plain(few[place], few[place].weight)
        assert weight.shape == whole[place].weight.shape
        assert (weight - whole[place].weight).norm() / whole[place].weight.norm() < nearness
    torch.testing.assert_close(plain(few[0], few[0].bias), whole[0].bias)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_weight_is_found_before_and_after_its_first_use(bits: Bits) -> None:
    few = tower().requires_grad_(False)
    quantize_frozen(few, bits)
    before = plain(few[0], few[0].weight)
    few(torch.randn(3, 64))
    torch.testing.assert_close(plain(few[0], few[0].weight), before)


def test_what_learns_and_what_cannot_be_packed_stay_whole() -> None:
    few = tower()
    few[0].requires_grad_(False)
    few[4].requires_grad_(False)
    quantize_frozen(few, "8bit")
    assert [type(few[place]) is nn.Linear for place in (0, 2, 4)] == [False, True, True]


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(InputError, match="no frozen linear layers"):
        quantize_frozen(tower(), "4bit")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_gradients_go_through_to_low_rank_updates(bits: Bits) -> None:
    model = nn.ModuleDict({"tower": tower()})
    get_peft_model(model, LoraConfig(r=2, target_modules=["tower.0", "tower.2"]))  # type: ignore[arg-type]
    quantize_frozen(model, bits)
    model["tower"](torch.randn(4, 64)).sum().backward()
    updates = {name: one.grad for name, one in model.named_parameters() if "lora_B" in name}
    assert len(updates) == 2
    assert all(gradient is not None and gradient.any() for gradient in updates.values())
    assert all(one.grad is None for name, one in model.named_parameters() if "lora_" not in name)
