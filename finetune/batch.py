"""Many sequences in one row of tokens, and where each of them lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

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

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in pinned memory, from where it is copied to a GPU in the background (for DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(one) for name, one in values.items() if isinstance(one, Tensor)}
        return replace(self, **changed)

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


@dataclass(frozen=True)
class PairBatch(Batch):
    """One row of pairs of proteins, each pair one sequence; made by :func:`pack_pairs`.

    Attributes:
        is_second: Which tokens belong to a pair's second protein, its boundary tokens too, bool [row_tokens].
    """

    is_second: Tensor

    def means(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Average ``states`` [row_tokens, size] over each protein's residues: fp32 [num_pairs, size] of either."""
        protein = 2 * self.sequence + self.is_second
        sums = states.new_zeros(2 * self.num_sequences, states.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, protein, states.float() * self.is_residue.unsqueeze(1))
        counts = torch.zeros(2 * self.num_sequences, device=states.device)
        means = sums / counts.index_add(0, protein, self.is_residue.float()).clamp(min=1).unsqueeze(1)
        return means[0::2], means[1::2]


def pack_pairs(vocabulary: Vocabulary, pairs: Sequence[tuple[NDArray[np.integer], NDArray[np.integer]]]) -> PairBatch:
    """Return pairs as one row on the CPU, joined as transformers' tokenizers join two sequences.

    ``<cls> A <eos> B <eos>``, BERT's ``[CLS] A [SEP] B [SEP]``; without an end token, ``[CLS] A [CLS] B``. Positions
    run on through the second protein.

    Args:
        vocabulary: The model's.
        pairs: Residue ids [num_residues] of both proteins of each.
    """
    before, between, after = boundaries = _pair_boundaries(vocabulary)
    lengths = [len(first) + len(second) + sum(map(len, boundaries)) for first, second in pairs]
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.concatenate([part for first, second in pairs for part in (before, first, between, second, after)])
    is_residue = np.zeros(len(tokens), dtype=np.bool_)
    is_second = np.zeros(len(tokens), dtype=np.bool_)
    for start, end, (first, second) in zip(bounds[:-1], bounds[1:], pairs, strict=True):
        middle = start + 1 + len(first)
        is_residue[start + 1 : middle] = True
        is_residue[middle + 1 : middle + 1 + len(second)] = True
        is_second[middle + len(after) : end] = True  # the end token between belongs to the first
    return PairBatch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(bounds[:-1], lengths)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        is_residue=torch.from_numpy(is_residue),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=tuple(lengths),
        is_second=torch.from_numpy(is_second),
    )


def num_pair_boundaries(vocabulary: Vocabulary) -> int:
    """Return how many tokens a pair has that are no residues."""
    return sum(map(len, _pair_boundaries(vocabulary)))


def _pair_boundaries(vocabulary: Vocabulary) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens before, between and after the proteins of a pair."""
    if vocabulary.end < 0:
        return [vocabulary.begin], [vocabulary.begin], []
    return [vocabulary.begin], [vocabulary.end], [vocabulary.end]
