"""Packed attention on the CPU in bf16 as plain matrix products, sequence by sequence.

A domain has some 160 residues, so its attention probabilities fit the second-level cache, and batched matrix products
of that size run fast in bf16, whereas torch's flash kernel for the CPU spends several times as long in its bf16
backward pass (docs/performance.md has the figures). Rotary positions are applied while each head's states are put
together. Scores are rounded to bf16 before the softmax, which works in fp32, as in transformers' plain attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaprot.pretrain.model.cpu_kernels import Reals, gather_heads, scatter_heads, softmax, softmax_backward
from megaprot.pretrain.model.cpu_threads import bits, on_all_threads

# Probabilities of longer sequences would fill the memory: they are computed again for the backward pass.
LONGEST_KEPT = 512
# Heads are taken in groups whose scores stay in the cache between the steps.
SCORE_BYTES = 1 << 21
# Lengths are rounded up: oneDNN builds code for each shape it meets and keeps that of 1,024.
LENGTH_MULTIPLE = 32

# Cosines and sines by token, each fp32 [tokens, 1, head_size].
Rotation = tuple[Tensor, Tensor]
# The same as numpy's arrays [tokens, head_size]; without rows nothing is rotated.
Table = tuple[Reals, Reals]
_NO_TABLE: Table = (np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))


def _table(rotation: Rotation | None) -> Table:
    return (rotation[0].squeeze(1).numpy(), rotation[1].squeeze(1).numpy()) if rotation else _NO_TABLE


def _rows(table: Table, places: slice) -> Table:
    return table[0][places], table[1][places]


def _places(lengths: tuple[int, ...]) -> list[slice]:
    """Return where each part begins and ends."""
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


class _States:
    """The memory of bf16 states [tokens, heads, head_size], of any strides of tokens and heads."""

    def __init__(self, states: Tensor) -> None:
        num_tokens, self.num_heads, self.head_size = states.shape
        states = states if states.stride(2) == 1 else states.contiguous()
        self.token_step, self.head_step, _ = states.stride()
        span = (num_tokens - 1) * self.token_step + (self.num_heads - 1) * self.head_step + self.head_size
        self.memory = bits(states.as_strided((span,), (1,)))

    def gathered(self, places: slice, table: Table, scale: float = 1.0) -> Tensor:
        """Return a segment's states [heads, their number rounded up, head_size], rotated and scaled."""
        number = places.stop - places.start
        padded_number = -(-number // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        gathered = torch.empty(self.num_heads, padded_number, self.head_size, dtype=torch.bfloat16)
        first, steps = places.start * self.token_step, (self.token_step, self.head_step)
        gather_heads(self.memory, first, *steps, *table, np.float32(scale), number, bits(gathered))
        return gathered


@dataclass
class _Segment:
    """A sequence of the row and what its backward pass needs.

    ``queries`` and ``tokens`` are its places in the row. ``query``, ``key`` and ``value`` are [heads, queries or tokens
    rounded up, head_size], rotated by their rows of the tables, the query scaled; ``kept`` are the probabilities by
    group of heads.
    """

    queries: slice
    tokens: slice
    query: Tensor
    key: Tensor
    value: Tensor
    query_table: Table
    table: Table
    kept: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and tokens."""
        return self.queries.stop - self.queries.start, self.tokens.stop - self.tokens.start

    def groups(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Yield groups of heads and their probabilities, where these were kept."""
        num_heads, padded_queries, _ = self.query.shape
        if padded_queries == 0:
            return
        size = max(1, min(num_heads, SCORE_BYTES // (2 * padded_queries * self.key.shape[1])))
        for number, head in enumerate(range(0, num_heads, size)):
            yield slice(head, head + size), self.kept[number] if self.kept else None

    def probabilities(self, heads: slice) -> Tensor:
        """Return softmax(Q K^T) of some heads [heads, queries rounded up, tokens rounded up]."""
        scores = torch.bmm(self.query[heads], self.key[heads].transpose(1, 2))
        softmax(bits(scores), *self.shape)
        return scores


class SegmentAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(head_size)) V within each segment of a packed row, Q and K rotated by their positions.

    ``apply(query, key, value, query_rotation, rotation, query_lengths, segment_lengths)`` takes bf16 tensors
    [queries, heads, head_size] and twice [tokens, heads, head_size], the ``Rotation`` of the queries and of the tokens
    (None: no rotation), and the queries and tokens of each segment; returns [queries, heads, head_size].
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
        """Attend; keep the probabilities of segments of up to ``LONGEST_KEPT`` tokens where a gradient is wanted."""
        output = torch.empty(query.shape, dtype=query.dtype)
        sources, target = [_States(states) for states in (query, key, value)], bits(output)
        has_backward = any(ctx.needs_input_grad)
        scale = 1 / math.sqrt(query.shape[-1])
        query_table, table = _table(query_rotation), _table(rotation)

        def attend(queries: slice, tokens: slice) -> _Segment:
            of_queries, of_tokens = _rows(query_table, queries), _rows(table, tokens)
            segment = _Segment(
                queries,
                tokens,
                sources[0].gathered(queries, of_queries, scale),
                sources[1].gathered(tokens, of_tokens),
                sources[2].gathered(tokens, _NO_TABLE),
                of_queries,
                of_tokens,
            )
            attended, kept = torch.empty_like(segment.query), []
            for heads, _ in segment.groups():
                probabilities = segment.probabilities(heads)
                torch.bmm(probabilities, segment.value[heads], out=attended[heads])
                if has_backward and segment.shape[1] <= LONGEST_KEPT:
                    kept.append(probabilities)
            segment.kept = kept
            scatter_heads(bits(attended), *_NO_TABLE, np.float32(1), target[queries])
            return segment

        places = zip(_places(query_lengths), _places(segment_lengths), strict=True)
        longest_first = sorted(places, key=lambda place: place[1].start - place[1].stop)  # threads end together
        segments = on_all_threads([partial(attend, *place) for place in longest_first])
        ctx.segments, ctx.scale, ctx.num_tokens = segments if has_backward else [], scale, len(key)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        (of_output,) = gradients
        source = _States(of_output)
        places = len(of_output), ctx.num_tokens, ctx.num_tokens
        results = [torch.empty(number, *of_output.shape[1:], dtype=of_output.dtype) for number in places]
        targets = [bits(result) for result in results]

        def attend_backward(segment: _Segment) -> None:
            of_attended = source.gathered(segment.queries, _NO_TABLE)
            # Nobody attends to a segment without queries; everywhere else all is written below.
            made = torch.empty_like if segment.shape[0] else torch.zeros_like
            of_query, of_key, of_value = map(made, (segment.query, segment.key, segment.value))
            for heads, known in segment.groups():
                probabilities = segment.probabilities(heads) if known is None else known
                torch.bmm(probabilities.transpose(1, 2), of_attended[heads], out=of_value[heads])
                of_scores = torch.bmm(of_attended[heads], segment.value[heads].transpose(1, 2))
                softmax_backward(bits(probabilities), bits(of_scores), segment.shape[0])
                torch.bmm(of_scores, segment.key[heads], out=of_query[heads])
                torch.bmm(of_scores.transpose(1, 2), segment.query[heads], out=of_key[heads])
            scatter_heads(bits(of_query), *segment.query_table, np.float32(ctx.scale), targets[0][segment.queries])
            scatter_heads(bits(of_key), *segment.table, np.float32(1), targets[1][segment.tokens])
            scatter_heads(bits(of_value), *_NO_TABLE, np.float32(1), targets[2][segment.tokens])
            segment.kept = []

        on_all_threads([partial(attend_backward, segment) for segment in ctx.segments])
        ctx.segments = []
        return (*results, None, None, None, None)
