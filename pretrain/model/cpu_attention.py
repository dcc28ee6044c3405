"""Packed attention on the CPU in bf16, sequence by sequence, by kernels of its own.

A domain has some 160 residues and a head some 16 channels: sizes for which neither torch's flash kernel for the CPU nor
batched matrix products come near the rate of the machine (docs/performance.md has the figures). Rotary positions are
applied while each head's states are put together; the loops themselves are in ``cpu_attention_kernels.py``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaprot.pretrain.model.cpu_attention_kernels import (
    LANES,
    NO_TABLE,
    Gathered,
    Segments,
    Strided,
    Table,
    attend_segments,
    attend_segments_backward,
)
from megaprot.pretrain.model.cpu_kernels import Bits
from megaprot.pretrain.model.cpu_threads import bits, on_all_threads

# Cosines and sines by token, each fp32 [tokens, 1, head_size].
Rotation = tuple[Tensor, Tensor]
# Segments are dealt into several times as many heaps as there are threads, so that all end together.
HEAPS_A_THREAD = 4


def _table(rotation: Rotation | None) -> Table:
    return (rotation[0].squeeze(1).numpy(), rotation[1].squeeze(1).numpy()) if rotation else NO_TABLE


def _bounds(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])


def _segments(query_lengths: tuple[int, ...], token_lengths: tuple[int, ...]) -> Segments:
    queries, tokens = np.array(query_lengths, np.int64), np.array(token_lengths, np.int64)
    rounded_up = (-(-lengths // LANES) * LANES for lengths in (queries, tokens))
    return Segments(*map(_bounds, (queries, tokens, *rounded_up)))


def _heaps(segments: Segments, number: int) -> list[NDArray[np.int64]]:
    """Deal segments into heaps of about the same number of scores, the largest heap first."""
    work = np.diff(segments.query_rows) * np.diff(segments.token_rows) + np.diff(segments.token_rows)
    totals = [0] * number
    heaps: list[list[int]] = [[] for _ in range(number)]
    for segment in np.argsort(-work, kind="stable"):
        least = totals.index(min(totals))
        heaps[least].append(int(segment))
        totals[least] += int(work[segment])
    order = sorted(range(number), key=lambda heap: -totals[heap])
    return [np.array(heaps[heap], np.int64) for heap in order if heaps[heap]]


def _strided(states: Tensor) -> Strided:
    """Return the memory of bf16 states [tokens, heads, head_size], copied only if channels are not side by side."""
    num_tokens, num_heads, head_size = states.shape
    states = states if states.stride(2) == 1 else states.contiguous()
    token_step, head_step, _ = states.stride()
    span = max(0, (num_tokens - 1) * token_step + (num_heads - 1) * head_step + head_size)
    return Strided(bits(states.as_strided((span,), (1,))), token_step, head_step)


def _check(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> None:
    """Raise ValueError for what the loops, which check nothing, would read beyond the end of."""
    places = int(segments.queries[-1]), int(segments.tokens[-1]), int(segments.tokens[-1])
    for states, number in zip((query, key, value), places, strict=True):
        if states.dtype != torch.bfloat16 or states.shape != (number, *query.shape[1:]):
            raise ValueError(
                f"attention on the CPU takes bf16 states {(number, *query.shape[1:])} as its segments have them, not "
                f"{states.dtype} {tuple(states.shape)}."
            )


class SegmentAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(head_size)) V within each segment of a packed row, Q and K rotated by their positions.

    ``apply(query, key, value, query_rotation, rotation, query_lengths, segment_lengths)`` takes bf16 tensors
    [queries, heads, head_size] and twice [tokens, heads, head_size], the ``Rotation`` of the queries and of the tokens
    (None: no rotation), and the queries and tokens of each segment; returns [queries, heads, head_size]. Scores and
    softmax are fp32; rotated queries and keys are rounded to bf16, weights and slopes too before products. Raises
    ValueError for states of other types or sizes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_rotation: Rotation | None,
        rotation: Rotation | None,
        query_lengths: tuple[int, ...],
        segment_lengths: tuple[int, ...],
    ) -> Tensor:
        """Attend; where a gradient is wanted, keep the rotated states and the softmax's sums."""
        _, num_heads, head_size = query.shape
        segments = _segments(query_lengths, segment_lengths)
        _check(query, key, value, segments)
        query_rows, token_rows = int(segments.query_rows[-1]), int(segments.token_rows[-1])

        def empty(rows: int) -> Bits:
            return bits(torch.empty(rows * num_heads * head_size, dtype=torch.bfloat16))

        sums = np.empty(query_rows * num_heads, np.float32)
        gathered = Gathered(empty(query_rows), empty(token_rows), empty(token_rows), sums)
        # What both passes take of the row.
        tables = _table(query_rotation), _table(rotation), np.float32(1 / math.sqrt(head_size))
        heaps = _heaps(segments, HEAPS_A_THREAD * torch.get_num_threads())
        output = torch.empty(query.shape, dtype=query.dtype)
        states = _strided(query), _strided(key), _strided(value)
        given = segments, states, *tables, gathered, bits(output)
        on_all_threads([partial(attend_segments, heap, *given) for heap in heaps])
        if any(ctx.needs_input_grad):
            ctx.kept, ctx.num_tokens = (heaps, segments, tables, gathered), len(key)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        (of_output,) = gradients
        if ctx.kept is None:
            raise RuntimeError("The states of this attention are gone: its gradients have been taken before.")
        heaps, segments, tables, gathered = ctx.kept
        ctx.kept = None
        places = len(of_output), ctx.num_tokens, ctx.num_tokens
        results = [torch.empty(number, *of_output.shape[1:], dtype=of_output.dtype) for number in places]
        given = segments, _strided(of_output), *tables, gathered, *map(bits, results)
        on_all_threads([partial(attend_segments_backward, heap, *given) for heap in heaps])
        return (*results, None, None, None, None)
