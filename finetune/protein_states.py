"""An encoder's states of whole proteins, read in overlapping windows where they are longer than it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.batch import Batch, pack
from megaprot.finetune.batching import windows
from megaprot.finetune.encoder import Encoder


@dataclass(frozen=True)
class Proteins:
    """Whole proteins and the sequences the encoder reads of them.

    Attributes:
        whole: All proteins as one row, as if the encoder took any length.
        read: What the encoder reads: the same row, or one of windows.
        cuts: (protein, first residue) of each sequence of ``read``.
    """

    whole: Batch
    read: Batch
    cuts: tuple[tuple[int, int], ...]

    @property
    def num_residues(self) -> list[int]:
        """Residues of each protein."""
        return _residues_of(self.whole)

    @cached_property
    def num_read(self) -> list[int]:
        """Residues of each sequence that the encoder reads."""
        return _residues_of(self.read)

    def to(self, device: torch.device) -> Proteins:
        """Return the same on a device."""
        whole = self.whole.to(device)
        return Proteins(whole, whole if self.read is self.whole else self.read.to(device), self.cuts)


def _residues_of(batch: Batch) -> list[int]:
    counts = torch.zeros(batch.num_sequences, dtype=torch.long, device=batch.sequence.device)
    found: list[int] = counts.index_add(0, batch.sequence, batch.is_residue.long()).tolist()
    return found


def gather_proteins(vocabulary: Vocabulary, longest: int, residues: Sequence[NDArray[np.integer]]) -> Proteins:
    """Return proteins as rows on the CPU.

    Args:
        vocabulary: The encoder's.
        longest: Most residues it reads at once; 0 for any number.
        residues: Ids of each protein's residues.
    """
    whole = pack(vocabulary, residues)
    if not longest or all(len(ids) <= longest for ids in residues):
        return Proteins(whole, whole, tuple((number, 0) for number in range(len(residues))))
    spans = [(number, *span) for number, ids in enumerate(residues) for span in windows(len(ids), longest)]
    read = pack(vocabulary, [residues[number][start:end] for number, start, end in spans])
    return Proteins(whole, read, tuple((number, start) for number, start, _ in spans))


def whole_states(
    encoder: Encoder, proteins: Proteins, on_attention: Callable[[int, int, Tensor], object] | None = None
) -> Tensor:
    """Return the last hidden states [row_tokens, hidden_size] of ``proteins.whole``.

    Residues in several windows have the mean of their states there; the first token's state is that of the protein's
    first window, the last token's that of its last.
    """
    (states,) = encoder(proteins.read, on_attention=on_attention)
    if proteins.read is proteins.whole:
        return states
    return _joined(states, proteins)


def _joined(states: Tensor, proteins: Proteins) -> Tensor:
    """Return the states of windows averaged into those of whole proteins."""
    whole, read = proteins.whole, proteins.read
    starts = torch.tensor([start for _, start in proteins.cuts], device=states.device)
    owners = torch.tensor([owner for owner, _ in proteins.cuts], device=states.device)
    lengths_whole = torch.tensor(whole.lengths, device=states.device)[owners]
    lengths_read = torch.tensor(read.lengths, device=states.device)
    is_first = starts == 0
    is_last = starts + lengths_read == lengths_whole
    keep = read.is_residue.clone()
    keep[read.cu_seqlens[:-1].long()[is_first]] = True
    keep[read.cu_seqlens[1:].long()[is_last] - 1] = True
    places = whole.cu_seqlens[:-1].long()[owners][read.sequence] + starts[read.sequence] + read.positions
    sums = torch.zeros(len(whole.tokens), states.shape[1], device=states.device).index_add(
        0, places[keep], states[keep].float()
    )
    counts = torch.zeros(len(whole.tokens), device=states.device).index_add(
        0, places[keep], torch.ones(int(keep.sum()), device=states.device)
    )
    return (sums / counts.unsqueeze(1)).to(states.dtype)
