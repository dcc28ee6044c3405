"""Frozen weights in 8 or 4 bits, by bitsandbytes, on GPUs and CPUs.

8 bits is LLM.int8 (Dettmers et al. 2022), 4 bits NF4 (QLoRA, Dettmers et al. 2023): a linear layer's weights are held
as small integers with scales and made whole where they are used. Gradients go through to LoRA's updates and to what
lies below.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megaprot.common.errors import InputError

Bits = Literal["8bit", "4bit"]
_MULTIPLE = 64


def require_bitsandbytes(key: str) -> None:
    """Raise InputError where bitsandbytes is not installed; ``key`` is what asks for it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--{key} needs the package bitsandbytes; pip install bitsandbytes.")


def quantize_frozen(tower: nn.Module, bits: Bits) -> None:
    """Quantize the linear layers whose weights do not learn, in place.

    Layers under LoRA's updates are among them. Embeddings and norms stay as they are, and so do layers whose sizes are
    no multiples of 64, which bitsandbytes cannot pack for a CPU.

    Raises:
        InputError: There is no such layer.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # says which faster kernels it has not
    found = [
        (parent, name, child)
        for parent in tower.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and not child.weight.requires_grad
        and not (child.in_features % _MULTIPLE or child.out_features % _MULTIPLE)
    ]  # fmt: skip
    if not found:
        raise InputError(f"a tower has no frozen linear layers with sizes that are multiples of {_MULTIPLE}: leave "
                         "quantize out.")  # fmt: skip
    for parent, name, child in found:
        setattr(parent, name, _quantized(child, bits))


def _quantized(layer: nn.Linear, bits: Bits) -> nn.Module:
    """Return a layer with the same weights in few bits."""
    import bitsandbytes as bnb

    size, has_bias, dtype = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.dtype
    made: Any
    if bits == "8bit":
        made = bnb.nn.Linear8bitLt(*size, bias=has_bias, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*size, bias=has_bias, quant_type="nf4", compute_dtype=dtype)
    made.load_state_dict(layer.state_dict())
    made.requires_grad_(False)
    quantized: nn.Module = made.to(layer.weight.device)
    return quantized


def plain(layer: nn.Module, parameter: Tensor) -> Tensor:
    """Return a layer's weight as fp32 numbers [outputs, inputs], whether quantized or not."""
    held: Any = layer
    if getattr(parameter, "quant_state", None) is not None:
        import bitsandbytes as bnb

        whole: Tensor = bnb.functional.dequantize_4bit(parameter.data, held.weight.quant_state)
        return whole.float()
    if parameter.dtype == torch.int8:
        scales: Tensor = held.state.SCB if held.state.SCB is not None else held.weight.SCB  # moved at the first use
        return parameter.data.float() * scales.float().unsqueeze(1) / 127
    return parameter.detach().float()
