"""Attention over many sequences in one row without padding, behind transformers' attention interface.

transformers calls :func:`packed_attention` in place of its own attention, with the keywords ``batch`` and
``on_attention`` that the model was called with. Three ways compute the same thing:

* ``torch.nn.attention.varlen``, flash attention over ``cu_seqlens``: on GPUs since Ampere, in bf16 and fp16;
* ``scaled_dot_product_attention`` over each run of sequences of one length: anywhere;
* matrix products with the attention maps in between, where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megaprot.finetune.batch import Batch

PACKED = "megaprot_packed"
"""The name transformers knows it by."""
OnAttention = Callable[[int, int, Tensor], object]
"""Told (layer from 0, first sequence, maps [num_sequences, heads, length, length]) of each run of equal lengths."""


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: Batch,
    on_attention: OnAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence of a row.

    Args:
        module: The attention layer, which has a ``layer_idx``.
        query: [1, heads, row_tokens, head_size]; ``key`` and ``value`` alike.
        attention_mask: Not used: the batch says what attends to what.
        batch: Where the sequences lie.
        on_attention: Told each layer's attention probabilities, before dropout; they are only made for it.
        scaling: Factor of the dot products; left out, 1 / sqrt(head_size).
        dropout: Dropout of the attention probabilities.

    Returns:
        [1, row_tokens, heads, head_size], and None in place of the weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if on_attention is None and _varlen_can(query, dropout):
        return _varlen(query, key, value, batch, scale).unsqueeze(0), None
    parts, start = [], 0
    for first, count, length in batch.runs:
        window = slice(start, start + count * length)
        query_nhld, key_nhld, value_nhld = (
            states[0, :, window].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)
        )
        if on_attention is None:
            attended_nhld = scaled_dot_product_attention(
                query_nhld, key_nhld, value_nhld, dropout_p=dropout, scale=scale
            )
        else:
            maps = (query_nhld @ key_nhld.transpose(2, 3) * scale).softmax(dim=-1)
            on_attention(int(module.layer_idx), first, maps)  # type: ignore[arg-type]
            attended_nhld = torch.nn.functional.dropout(maps, dropout) @ value_nhld
        parts.append(attended_nhld.transpose(1, 2).flatten(0, 1))
        start = window.stop
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _varlen_can(query: Tensor, dropout: float) -> bool:
    """Tell whether flash attention over ``cu_seqlens`` takes these states."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or dropout > 0:
        return False
    head_size = query.shape[-1]
    return head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> Tensor:
    """Return the attended values [row_tokens, heads, head_size] by flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    query = query * (scale * query.shape[-1] ** 0.5)  # the kernel scales by 1 / sqrt(head_size)
    query_thd, key_thd, value_thd = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    longest = max(batch.lengths)
    attended = varlen_attn(query_thd, key_thd, value_thd, batch.cu_seqlens, batch.cu_seqlens, longest, longest)
    assert isinstance(attended, Tensor)  # a pair only when auxiliary output is asked for
    return attended


def register() -> bool:
    """Make the attention known to transformers; return False where its version has no attention interface."""
    try:
        from transformers import AttentionInterface
    except ImportError:
        return False
    AttentionInterface.register(PACKED, packed_attention)
    return True
