"""Whole sequences into rows of a fixed number of tokens: the plan of an epoch, and the row that the model reads.

A row holds many sequences with no padding between them; attention is block-diagonal by ``cu_seqlens``. Best fit is
Johnson's (1974): a sequence goes to the open row with the least room that still takes it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megaprot.common import counter_random
from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary

# What a key is drawn for: numbers of the same (seed, epoch) never meet.
_ORDER_OF_SEQUENCES, _ORDER_OF_ROWS = 1, 2
# Sequences are taken longest first inside shuffled windows of this many. Larger windows pack closer but put sequences
# of like length together in a row; with 256, rows of 2,048 lose about 0.2 % to padding and rows of 512 about 0.8 %.
_WINDOW = 256
# Sequences turned into Python numbers at a time, which bounds the memory of planning.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class PackingPlan:
    """Which sequences each row of one epoch holds.

    ``row_starts`` int64 [num_rows + 1] points into ``sequence_ids`` int64 [num_sequences], where every sequence of the
    corpus stands exactly once.
    """

    row_starts: NDArray[np.int64]
    sequence_ids: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """Number of rows of the epoch."""
        return len(self.row_starts) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Return the sequence numbers of row ``index``, in the order they stand in it."""
        return self.sequence_ids[self.row_starts[index] : self.row_starts[index + 1]]


@dataclass(frozen=True)
class UnmaskedRow:
    """A row before masking.

    ``tokens``, ``positions`` and ``cu_seqlens`` as in ``PackedRow``. ``residue_positions`` int64 [num_residues] are the
    places of the residues in the row, ascending; ``residue_counters`` int64 [num_residues] their places in their
    sequence, from 0.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    residue_positions: NDArray[np.int64]
    residue_counters: NDArray[np.int64]


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch of one row, as numpy arrays, after masking.

    ``tokens`` int64 [row_tokens]; ``positions`` int64 [row_tokens], from 0 in each sequence and 0 all over the padding;
    ``cu_seqlens`` int32 [num_segments + 1], from 0 to row_tokens: sequences first, then, where there is padding, it is
    the last segment; ``num_sequences`` counts the segments without it. ``masked_positions`` int64, ``labels`` int64 and
    ``masked_kind`` uint8, all [capacity]: where a loss is taken, the true token there, and what stands there instead
    (see ``megaprot.common.masking``; unused places hold 0, the pad token and kind 0). ``num_residues`` counts real
    residues, without special tokens and padding.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    num_sequences: int
    masked_positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    masked_kind: NDArray[np.uint8]
    num_residues: int


@dataclass(frozen=True)
class PackedBatch:
    """A ``PackedRow`` as tensors on one device; shapes and types are the row's.

    ``segment_lengths`` (padding included) and ``max_segment_length`` are on the host, so that attention needs no
    synchronisation with the device.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    num_sequences: int
    masked_positions: torch.Tensor
    labels: torch.Tensor
    masked_kind: torch.Tensor
    num_residues: int
    segment_lengths: list[int]
    max_segment_length: int


def to_tensors(row: PackedRow, device: torch.device) -> PackedBatch:
    """Copy a row to ``device``: from pinned memory to a GPU, without waiting for it; on a CPU nothing is copied."""

    def moved(array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    segment_lengths = np.diff(row.cu_seqlens).tolist()
    return PackedBatch(
        tokens=moved(row.tokens),
        positions=moved(row.positions),
        cu_seqlens=moved(row.cu_seqlens),
        num_sequences=row.num_sequences,
        masked_positions=moved(row.masked_positions),
        labels=moved(row.labels),
        masked_kind=moved(row.masked_kind),
        num_residues=row.num_residues,
        segment_lengths=segment_lengths,
        max_segment_length=max(segment_lengths),
    )


def check_row_shape(row_tokens: int, max_sequence_length: int, num_boundary_tokens: int) -> None:
    """Raise InputError unless a sequence of at least one residue, boundary tokens included, fits a row."""
    if max_sequence_length <= num_boundary_tokens:
        raise InputError(
            f"data.max_sequence_length is {max_sequence_length}, which leaves no residue beside "
            f"{num_boundary_tokens} boundary token(s): give at least {num_boundary_tokens + 1}"
        )
    if max_sequence_length > row_tokens:
        raise InputError(
            f"data.max_sequence_length ({max_sequence_length}) is larger than data.row_tokens ({row_tokens}): "
            "lower the first or raise the second"
        )


def plan_epoch(
    lengths: NDArray[np.integer],
    row_tokens: int,
    max_sequence_length: int,
    num_boundary_tokens: int,
    seed: int,
    epoch: int,
) -> PackingPlan:
    """Put every sequence into a row of ``row_tokens``, by best fit over windows of an order drawn from (seed, epoch).

    ``lengths`` [num_sequences] are in residues; a sequence takes ``num_boundary_tokens`` more and is cut at
    ``max_sequence_length`` with them. Rows come in a second random order, since the first ones opened are the fullest.
    A pure function of its arguments. Raises InputError when no sequence can fit.
    """
    check_row_shape(row_tokens, max_sequence_length, num_boundary_tokens)
    num_tokens = np.minimum(lengths, max_sequence_length - num_boundary_tokens) + num_boundary_tokens
    order = counter_random.permutation(counter_random.key(_ORDER_OF_SEQUENCES, seed, epoch), len(lengths))
    order = order[np.lexsort((-num_tokens[order], np.arange(len(order)) // _WINDOW))]
    row_of = _best_fit(num_tokens[order], row_tokens)
    num_rows = int(row_of.max(initial=-1)) + 1
    row_of = counter_random.permutation(counter_random.key(_ORDER_OF_ROWS, seed, epoch), num_rows)[row_of]
    row_starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=row_starts[1:])
    return PackingPlan(row_starts, order[np.argsort(row_of, kind="stable")])


def _best_fit(num_tokens: NDArray[np.integer], row_tokens: int) -> NDArray[np.int64]:
    """Return the row of each sequence [n], taken in turn: the one with the least room that takes it, else a new one."""
    row_of = np.empty(len(num_tokens), dtype=np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # rows by free tokens
    room_bits = 0  # bit r is set when a row with r free tokens exists, so that one bit operation finds the best fit
    num_rows = 0
    for start in range(0, len(num_tokens), _CHUNK):
        rows_of_chunk = []
        for needed in num_tokens[start : start + _CHUNK].tolist():
            fitting = room_bits >> needed
            if fitting:
                room = needed + (fitting & -fitting).bit_length() - 1
                row = rows_with_room[room].pop()
                if not rows_with_room[room]:
                    room_bits ^= 1 << room
            else:
                room, row = row_tokens, num_rows
                num_rows += 1
            room -= needed
            rows_with_room[room].append(row)
            room_bits |= 1 << room
            rows_of_chunk.append(row)
        row_of[start : start + _CHUNK] = rows_of_chunk
    return row_of


def lay_out_row(
    residues: NDArray[np.uint8],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    row_tokens: int,
    vocabulary: Vocabulary,
) -> UnmaskedRow:
    """Put pieces of a flat array of residue ids side by side into a row, each between its boundary tokens.

    Piece s is ``residues[starts[s] : starts[s] + lengths[s]]``; with boundary tokens all must fit ``row_tokens``. No
    pieces make a row of padding. The work is a fixed number of array operations, however many sequences there are.
    """
    ends = np.cumsum(lengths + vocabulary.num_boundary_tokens)
    begins = ends - lengths - vocabulary.num_boundary_tokens
    counters = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    residue_positions = counters + np.repeat(begins + 1, lengths)
    tokens = np.full(row_tokens, vocabulary.pad, dtype=np.int64)
    positions = np.zeros(row_tokens, dtype=np.int64)
    tokens[begins] = vocabulary.begin
    tokens[residue_positions] = residues[counters + np.repeat(starts, lengths)]
    positions[residue_positions] = counters + 1
    if vocabulary.end >= 0:
        tokens[ends - 1] = vocabulary.end
        positions[ends - 1] = lengths + 1
    bounds = np.concatenate(([0], ends, [row_tokens]))
    if len(ends) and ends[-1] == row_tokens:  # no padding
        bounds = bounds[:-1]
    return UnmaskedRow(tokens, positions, bounds.astype(np.int32), residue_positions, counters)
