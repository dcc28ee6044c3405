"""Whole sequences in a row of a fixed number of tokens: the row that the model reads, and how it is laid out.

A row holds many sequences with no padding between them; attention is block-diagonal by ``cu_seqlens``.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from megaprot.common.vocabulary import Vocabulary


@dataclass(frozen=True)
class UnmaskedRow:
    """A row before masking; ``tokens``, ``positions``, ``cu_seqlens`` and ``num_sequences`` as in ``PackedRow``."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    num_sequences: int


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch of one row, as numpy arrays, after masking.

    ``tokens`` int64 [row_tokens]; ``positions`` int64 [row_tokens], from 0 in each sequence and 0 all over the padding;
    ``cu_seqlens`` int32 [num_segments + 1], from 0 to row_tokens: sequences first, then, where there is padding, it is
    the last segment; ``num_sequences`` counts the segments without it. ``masked_positions`` int64, ``labels`` int64 and
    ``masked_kind`` uint8, all [capacity]: where a loss is taken, the true token there, and what stands there instead
    (see ``megaprot.common.masking``; positions ascend; unused places hold the row's last one, the pad token and kind
    0). ``num_residues`` counts real residues, without special tokens and padding.
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

    ``masked_cu_seqlens`` int32 [num_segments + 1] are bounds among ``masked_positions``: those of segment s stand from
    ``masked_cu_seqlens[s]`` on. ``segment_lengths`` (padding included) and ``masked_lengths``, the same two bounds as
    lengths, are on the host, so that attention needs no synchronisation with the device.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    masked_positions: torch.Tensor
    masked_cu_seqlens: torch.Tensor
    labels: torch.Tensor
    masked_kind: torch.Tensor
    segment_lengths: tuple[int, ...]
    masked_lengths: tuple[int, ...]


def to_tensors(row: PackedRow, device: torch.device) -> PackedBatch:
    """Copy a row to ``device``: from pinned memory to a GPU, without waiting for it; on a CPU nothing is copied."""

    def moved(array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    masked_bounds = np.searchsorted(row.masked_positions, row.cu_seqlens).astype(np.int32)
    return PackedBatch(
        tokens=moved(row.tokens),
        positions=moved(row.positions),
        cu_seqlens=moved(row.cu_seqlens),
        masked_positions=moved(row.masked_positions),
        masked_cu_seqlens=moved(masked_bounds),
        labels=moved(row.labels),
        masked_kind=moved(row.masked_kind),
        segment_lengths=tuple(np.diff(row.cu_seqlens).tolist()),
        masked_lengths=tuple(np.diff(masked_bounds).tolist()),
    )


def lay_out_row(
    residues: NDArray[np.integer],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    row_tokens: int,
    vocabulary: Vocabulary,
) -> UnmaskedRow:
    """Put pieces of a flat array of residue ids side by side into a row, each between its boundary tokens.

    Piece s is ``residues[starts[s] : starts[s] + lengths[s]]``; with boundary tokens all must fit ``row_tokens``. No
    pieces make a row of padding.
    """
    used = int(lengths.sum()) + vocabulary.num_boundary_tokens * len(lengths)
    if used > row_tokens:
        raise ValueError(f"{used} tokens do not fit a row of {row_tokens}")
    cu_seqlens = np.empty(len(lengths) + (1 if used == row_tokens else 2), dtype=np.int32)
    cu_seqlens[-1] = row_tokens
    tokens = np.empty(row_tokens, dtype=np.int64)
    positions = np.empty(row_tokens, dtype=np.int64)
    _fill(residues, starts, lengths, tokens, positions, cu_seqlens, vocabulary.begin, vocabulary.end, vocabulary.pad)
    return UnmaskedRow(tokens, positions, cu_seqlens, len(lengths))


@numba.njit(cache=True, nogil=True)
def _fill(
    residues: NDArray[np.integer],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    tokens: NDArray[np.int64],
    positions: NDArray[np.int64],
    cu_seqlens: NDArray[np.int32],
    begin: int,
    end: int,
    pad: int,
) -> None:
    """Write tokens, positions and sequence starts; native because rows are built as fast as they are read."""
    place = 0
    for piece in range(len(lengths)):
        cu_seqlens[piece] = place
        start, length = starts[piece], lengths[piece]
        tokens[place] = begin
        positions[place] = 0
        place += 1
        piece_tokens, piece_positions = tokens[place : place + length], positions[place : place + length]
        piece_residues = residues[start : start + length]
        for residue in range(length):
            piece_tokens[residue] = piece_residues[residue]
            piece_positions[residue] = residue + 1
        place += length
        if end >= 0:
            tokens[place] = end
            positions[place] = length + 1
            place += 1
    cu_seqlens[len(lengths)] = place
    tokens[place:] = pad
    positions[place:] = 0
