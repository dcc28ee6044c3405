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


class _States:
    """The memory of bf16 states [tokens, heads, head_size], of any strides of tokens and heads."""

    def __init__(self, states: Tensor) -> None:
        num_tokens, self.num_heads, self.head_size = states.shape
        states = states if states.stride(2) == 1 else states.contiguous()
        self.token_step, self.head_step, _ = states.stride()
        span = (num_tokens - 1) * self.token_step + (self.num_heads - 1) * self.head_step + self.head_size
        self.memory = bits(states.as_strided((span,), (1,)))

    def gathered(self, start: int, length: int, cos: Reals, sin: Reals, scale: float = 1.0) -> Tensor:
        """Return a segment's states [heads, length rounded up, head_size], rotated and scaled."""
        padded_length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        gathered = torch.empty(self.num_heads, padded_length, self.head_size, dtype=torch.bfloat16)
        first, steps = start * self.token_step, (self.token_step, self.head_step)
        gather_heads(self.memory, first, *steps, cos, sin, np.float32(scale), length, bits(gathered))
        return gathered


@dataclass
class _Segment:
    """A sequence of the row and what its backward pass needs.

    ``query``, ``key`` and ``value`` are [heads, length rounded up, head_size], rotated, the query scaled; ``kept`` are
    the probabilities by group of heads.
    """

    start: int
    length: int
    query: Tensor
    key: Tensor
    value: Tensor
    cos: Reals
    sin: Reals
    kept: list[Tensor] = field(default_factory=list)

    def groups(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Yield groups of heads and their probabilities, where these were kept."""
        num_heads, padded_length, _ = self.query.shape
        size = max(1, min(num_heads, SCORE_BYTES // (2 * padded_length * padded_length)))
        for number, head in enumerate(range(0, num_heads, size)):
            yield slice(head, head + size), self.kept[number] if self.kept else None

    def probabilities(self, heads: slice) -> Tensor:
        """Return softmax(Q K^T) of some heads [heads, padded length, padded length]."""
        scores = torch.bmm(self.query[heads], self.key[heads].transpose(1, 2))
        softmax(bits(scores), self.length)
        return scores


class SegmentAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(head_size)) V within each segment of a packed row, Q and K rotated by their positions.

    ``apply(query, key, value, cos, sin, segment_lengths)`` takes three bf16 tensors [tokens, heads, head_size], the
    fp32 rotary table [tokens, 1, head_size] twice (None: no rotation) and the tokens of each segment; returns
    [tokens, heads, head_size].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        segment_lengths: tuple[int, ...],
    ) -> Tensor:
        """Attend; keep the probabilities of segments of up to ``LONGEST_KEPT`` tokens where a gradient is wanted."""
        output = torch.empty(query.shape, dtype=query.dtype)
        sources, target = [_States(states) for states in (query, key, value)], bits(output)
        has_backward = any(ctx.needs_input_grad)
        scale = 1 / math.sqrt(query.shape[-1])
        table = [np.empty((0, 0), np.float32) if part is None else part.squeeze(1).numpy() for part in (cos, sin)]

        def attend(start: int, length: int) -> _Segment:
            tokens = slice(start, start + length)
            cosines, sines = (part[tokens] for part in table)
            segment = _Segment(
                start,
                length,
                sources[0].gathered(start, length, cosines, sines, scale),
                sources[1].gathered(start, length, cosines, sines),
                sources[2].gathered(start, length, cosines[:0], sines[:0]),
                cosines,
                sines,
            )
            attended, kept = torch.empty_like(segment.value), []
            for heads, _ in segment.groups():
                probabilities = segment.probabilities(heads)
                torch.bmm(probabilities, segment.value[heads], out=attended[heads])
                if has_backward and length <= LONGEST_KEPT:
                    kept.append(probabilities)
            segment.kept = kept
            scatter_heads(bits(attended), cosines[:0], sines[:0], np.float32(1), target[tokens])
            return segment

        starts = np.cumsum((0, *segment_lengths[:-1])).tolist()
        places = sorted(zip(starts, segment_lengths, strict=True), key=lambda place: -place[1])  # threads end together
        segments = on_all_threads([partial(attend, *place) for place in places])
        ctx.segments, ctx.scale = segments if has_backward else [], scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        (of_output,) = gradients
        source = _States(of_output)
        results = [torch.empty(of_output.shape, dtype=of_output.dtype) for _ in range(3)]
        targets = [bits(result) for result in results]

        def attend_backward(segment: _Segment) -> None:
            tokens, none = slice(segment.start, segment.start + segment.length), segment.cos[:0]
            of_attended = source.gathered(segment.start, segment.length, none, none)
            of_query, of_key, of_value = (torch.empty_like(segment.query) for _ in range(3))
            for heads, known in segment.groups():
                probabilities = segment.probabilities(heads) if known is None else known
                torch.bmm(probabilities.transpose(1, 2), of_attended[heads], out=of_value[heads])
                of_scores = torch.bmm(of_attended[heads], segment.value[heads].transpose(1, 2))
                softmax_backward(bits(probabilities), bits(of_scores), segment.length)
                torch.bmm(of_scores, segment.key[heads], out=of_query[heads])
                torch.bmm(of_scores.transpose(1, 2), segment.query[heads], out=of_key[heads])
            scatter_heads(bits(of_query), segment.cos, segment.sin, np.float32(ctx.scale), targets[0][tokens])
            scatter_heads(bits(of_key), segment.cos, segment.sin, np.float32(1), targets[1][tokens])
            scatter_heads(bits(of_value), none, none, np.float32(1), targets[2][tokens])
            segment.kept = []

        on_all_threads([partial(attend_backward, segment) for segment in ctx.segments])
        ctx.segments = []
        return (*results, None, None, None)
