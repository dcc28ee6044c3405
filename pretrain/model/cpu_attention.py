"""Packed attention on the CPU as plain matrix products, sequence by sequence, each of a size that stays in the cache.

A domain has some 160 residues, so its attention probabilities fit the second-level cache, and batched matrix products
of that size run fast in bf16, whereas torch's flash kernel for the CPU spends several times as long in its bf16 backward
pass (docs/performance.md has the figures). Scores are rounded to the precision of the inputs before the softmax, which
works in fp32, as in transformers' plain attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Probabilities of longer sequences would fill the memory: they are computed again for the backward pass.
LONGEST_KEPT = 512
# Heads are taken in groups whose scores stay in the cache between the steps.
SCORE_BYTES = 1 << 21


class SegmentAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(head_size)) V within each segment of a packed row.

    ``apply(query, key, value, segment_lengths)`` takes three tensors [tokens, heads, head_size], of any strides, and
    the tokens of each segment; returns [tokens, heads, head_size].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segment_lengths: tuple[int, ...]) -> Tensor:
        """Attend; keep the probabilities of segments of up to ``LONGEST_KEPT`` tokens where a gradient is wanted."""
        output = torch.empty(query.shape, dtype=query.dtype)
        parts = (states.transpose(0, 1) for states in (query, key, value, output))
        query_htd, key_htd, value_htd, output_htd = parts
        is_kept = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        for heads, tokens in _pieces(query.shape[1], segment_lengths, query.element_size()):
            probabilities = _probabilities(query_htd[heads, tokens], key_htd[heads, tokens])
            torch.bmm(probabilities, value_htd[heads, tokens], out=output_htd[heads, tokens])
            kept.append(probabilities if is_kept and probabilities.shape[-1] <= LONGEST_KEPT else None)
        ctx.save_for_backward(query, key, value)
        ctx.segment_lengths, ctx.kept = segment_lengths, kept
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        inputs = ctx.saved_tensors
        results = [torch.empty(states.shape, dtype=states.dtype) for states in inputs]
        scale = 1 / math.sqrt(inputs[0].shape[-1])
        query, key, value, of_output = (states.transpose(0, 1) for states in (*inputs, *gradients))
        of_query, of_key, of_value = (states.transpose(0, 1) for states in results)
        pieces = _pieces(query.shape[0], ctx.segment_lengths, query.element_size())
        for (heads, tokens), known in zip(pieces, ctx.kept, strict=True):
            piece = heads, tokens
            probabilities = _probabilities(query[piece], key[piece]) if known is None else known
            torch.bmm(probabilities.transpose(1, 2), of_output[piece], out=of_value[piece])
            of_probabilities = torch.bmm(of_output[piece], value[piece].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            _scaled_product(of_scores, key[piece], scale, of_query[piece])
            _scaled_product(of_scores.transpose(1, 2), query[piece], scale, of_key[piece])
        ctx.kept = []
        return (*results, None)


def _pieces(num_heads: int, segment_lengths: tuple[int, ...], element_size: int) -> list[tuple[slice, slice]]:
    """Return groups of heads and tokens of a segment, in order."""
    pieces, start = [], 0
    for length in segment_lengths:
        group = max(1, min(num_heads, SCORE_BYTES // (length * length * element_size)))
        tokens = slice(start, start + length)
        pieces += [(slice(head, min(head + group, num_heads)), tokens) for head in range(0, num_heads, group)]
        start += length
    return pieces


def _probabilities(query_hld: Tensor, key_hld: Tensor) -> Tensor:
    heads, length, head_size = query_hld.shape
    scores = query_hld.new_empty(heads, length, length)
    _scaled_product(query_hld, key_hld.transpose(1, 2), 1 / math.sqrt(head_size), scores)
    return torch.softmax(scores, dim=-1)


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
