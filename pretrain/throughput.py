"""Arithmetic of a step, and the rates that follow from it."""

from __future__ import annotations

import resource
import sys

import torch

from megaprot.pretrain.config import ModelConfig

# Dense bf16/fp16 rates of the data sheets, in TFLOP/s.
_DATA_SHEET = {"A100": 312.0, "H100 80GB HBM3": 989.0, "H200": 989.0, "B200": 2250.0}


def training_flops(
    model: ModelConfig, vocabulary_size: int, num_tokens: float, sum_squared_lengths: float, num_masked: float
) -> float:
    """Return the floating-point operations of one forward and backward pass, padding and recomputation not counted.

    A multiply-add is two operations and the backward pass costs twice the forward pass. Per token and layer the
    matrices cost 2 (4 h^2 + 2 h f); attention costs 4 h times the token's own sequence length, so it is summed by
    sequence. The last layer makes query, key and value of every token, 6 h^2 a token; the rest of it, and the head at
    2 (h^2 + h V) each, is computed on masked positions only. These are taken to fall alike on all tokens.

    Args:
        model: Shape.
        vocabulary_size: True vocabulary size V.
        num_tokens: Tokens in sequences, boundary tokens included.
        sum_squared_lengths: Sum of squared sequence lengths in tokens.
        num_masked: Masked positions.
    """
    hidden, feed_forward = model.hidden_size, model.feed_forward_size
    projections = 6.0 * hidden * hidden * num_tokens
    rest = 2.0 * (hidden * hidden + 2 * hidden * feed_forward) * num_tokens + 4.0 * hidden * sum_squared_lengths
    last = projections + rest * num_masked / max(num_tokens, 1.0)
    head = 2.0 * (hidden * hidden + hidden * vocabulary_size) * num_masked
    return 3.0 * ((model.num_layers - 1) * (projections + rest) + last + head)


def peak_tflops(given: float) -> float:
    """Return the matrix rate of one device in TFLOP/s: ``given``, else the data sheet's, else 0 for unknown."""
    if given or not torch.cuda.is_available():
        return given
    name = torch.cuda.get_device_name()
    return next((rate for chip, rate in _DATA_SHEET.items() if chip in name), 0.0)


def peak_memory_bytes() -> float:
    """Return the most memory this process has held: on the CUDA device, or resident on a machine without one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
