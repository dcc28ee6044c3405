"""Many sequences in one row of tokens, and where each of them lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.common.vocabulary import Vocabulary


@dataclass(frozen=True)
class Batch:
    """One row of sequences, one after another without padding; made by :func:`pack`.

    ``dataclasses.replace(batch, tokens=masked)`` gives the same row with other tokens.

    Attributes:
        tokens: Ids int64 [row_tokens], boundary tokens included.
        positions: Place of each token in its sequence, from 0, int64 [row_tokens].
        sequence: Number of the sequence each token belongs to, int64 [row_tokens].
        is_residue: Which tokens are residues, not boundaries, bool [row_tokens].
        cu_seqlens: First token of each sequence, and the end of the last, int32 [num_sequences + 1].
        lengths: Tokens of each sequence.
    """

    tokens: Tensor
    positions: Tensor
    sequence: Tensor
    is_residue: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        """Sequences in the row."""
        return len(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(First sequence, number of sequences, tokens of each) of each run of neighbours of one length."""
        runs: list[tuple[int, int, int]] = []
        for number, length in enumerate(self.lengths):
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((number, 1, length))
        return tuple(runs)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from where it is copied to a GPU in the background (for DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            tokens=change(self.tokens),
            positions=change(self.positions),
            sequence=change(self.sequence),
            is_residue=change(self.is_residue),
            cu_seqlens=change(self.cu_seqlens),
            lengths=self.lengths,
        )

    def residues(self, states: Tensor) -> list[Tensor]:
        """Return the rows of ``states`` [row_tokens, ...] that belong to residues, [num_residues, ...] a sequence."""
        parts = zip(states.split(self.lengths), self.is_residue.split(self.lengths), strict=True)
        return [part[is_residue] for part, is_residue in parts]

    def mean(self, states: Tensor) -> Tensor:
        """Average ``states`` [row_tokens, size] over each sequence's residues: fp32 [num_sequences, size]."""
        sums = states.new_zeros(self.num_sequences, states.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, self.sequence, states.float() * self.is_residue.unsqueeze(1))
        counts = torch.zeros(self.num_sequences, device=states.device)
        return sums / counts.index_add(0, self.sequence, self.is_residue.float()).unsqueeze(1)

    def first(self, states: Tensor) -> Tensor:
        """Return the rows of ``states`` [row_tokens, ...] of each sequence's first token, [num_sequences, ...]."""
        return states[self.cu_seqlens[:-1].long()]


def pack(vocabulary: Vocabulary, sequences: Sequence[NDArray[np.integer]]) -> Batch:
    """Return sequences as one row on the CPU, each between the vocabulary's boundary tokens.

    Args:
        vocabulary: The model's.
        sequences: Residue ids [num_residues] of each, as :func:`megaprot.finetune.residues.encode` gives them.
    """
    lengths = [len(residues) + vocabulary.num_boundary_tokens for residues in sequences]
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    num_tokens = int(bounds[-1])
    tokens = np.empty(num_tokens, dtype=np.int64)
    is_residue = np.ones(num_tokens, dtype=np.bool_)
    tokens[bounds[:-1]] = vocabulary.begin
    is_residue[bounds[:-1]] = False
    if vocabulary.end >= 0:
        tokens[bounds[1:] - 1] = vocabulary.end
        is_residue[bounds[1:] - 1] = False
    tokens[is_residue] = np.concatenate(sequences)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(num_tokens) - np.repeat(bounds[:-1], lengths)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        is_residue=torch.from_numpy(is_residue),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=tuple(lengths),
    )
