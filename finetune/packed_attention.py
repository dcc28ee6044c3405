"""Attention over many sequences in one row without padding, behind transformers' attention interface.

transformers calls the registered functions in place of its own attention, with the keyword ``segments`` that the model
was called with. Two kernels compute the same thing:

* ``megaprot_sdpa``: ``scaled_dot_product_attention`` over each run of sequences of one length, anywhere;
* ``megaprot_varlen``: ``torch.nn.attention.varlen``, flash attention over ``cu_seqlens`` (CUDA; bf16 or fp16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SDPA, VARLEN = "megaprot_sdpa", "megaprot_varlen"


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a row lie.

    Attributes:
        runs: (first token, number of sequences, tokens of each) of each run of neighbours of one length.
        cu_seqlens: Bounds int32 [num_sequences + 1] on the row's device, for ``varlen``.
        longest: Tokens of the longest sequence.
    """

    runs: tuple[tuple[int, int, int], ...]
    cu_seqlens: Tensor
    longest: int


def segments_of(lengths: Sequence[int], device: torch.device) -> Segments:
    """Return the segments of a row that holds sequences of these lengths (tokens, boundary tokens included)."""
    runs: list[tuple[int, int, int]] = []
    bounds = [0]
    for length in lengths:
        if runs and runs[-1][2] == length:
            start, count, _ = runs[-1]
            runs[-1] = (start, count + 1, length)
        else:
            runs.append((bounds[-1], 1, length))
        bounds.append(bounds[-1] + length)
    return Segments(tuple(runs), torch.tensor(bounds, dtype=torch.int32).to(device), max(lengths))


def sdpa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence; sequences of one length that stand side by side are one call.

    Args:
        module: The attention layer; not used.
        query: [1, heads, row_tokens, head_size]; ``key`` and ``value`` alike.
        attention_mask: Not used: the segments are the mask.
        segments: Where the sequences lie.
        scaling: Factor of the dot products; left out, 1 / sqrt(head_size).
        dropout: Dropout of the attention weights.

    Returns:
        [1, row_tokens, heads, head_size], and None in place of the weights.
    """
    parts = []
    for start, count, length in segments.runs:
        window = slice(start, start + count * length)
        states = (part[0, :, window].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value))
        attended_nhld = scaled_dot_product_attention(*states, dropout_p=dropout, scale=scaling)
        parts.append(attended_nhld.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Do what :func:`sdpa_attention` does in one kernel, without dropout of the attention weights."""
    from torch.nn.attention.varlen import varlen_attn

    head_size = query.shape[-1]
    if scaling is not None and scaling * head_size**0.5 != 1.0:
        query = query * (scaling * head_size**0.5)  # the kernel scales by 1 / sqrt(head_size)
    query_thd, key_thd, value_thd = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    bounds, longest = segments.cu_seqlens, segments.longest
    attended = varlen_attn(query_thd, key_thd, value_thd, bounds, bounds, longest, longest)
    assert isinstance(attended, Tensor)  # a pair only when auxiliary output is asked for
    return attended.unsqueeze(0), None


def choose_kernel(device: torch.device, precision: str, head_size: int, attention_dropout: float) -> str:
    """Return the fastest kernel that can run: ``varlen`` on recent GPUs in bf16 without attention dropout."""
    if device.type != "cuda" or precision != "bf16" or attention_dropout > 0:
        return SDPA
    fits = head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)
    return VARLEN if fits else SDPA


def register() -> bool:
    """Make both kernels known to transformers; return False where its version has no attention interface."""
    try:
        from transformers import AttentionInterface
    except ImportError:
        return False
    AttentionInterface.register(SDPA, sdpa_attention)
    AttentionInterface.register(VARLEN, varlen_attention)
    return True
