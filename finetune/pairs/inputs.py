"""What a pair model is called with: pairs in one row, masked in training, each a part of one of its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megaprot.common.counter_random import key, keys
from megaprot.common.masking import MaskingConfig
from megaprot.common.packing import UnmaskedRow
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.batch import PairBatch, pack_pairs
from megaprot.finetune.masked_rows import mask_row
from megaprot.finetune.pairs.files import Residues

_MASKS = int.from_bytes(b"pairmask")
"""Sets the stream of masks apart from whatever else a seed is for."""


@dataclass(frozen=True)
class Reading:
    """One pair as the encoder reads it.

    Attributes:
        first: Residue ids of the protein that stands first, or of a part of it.
        second: Of the other.
        score: Number of the score it belongs to; several windows make one score.
        stream: Number of its masks' random stream.
    """

    first: Residues
    second: Residues
    score: int
    stream: int = 0


@dataclass(frozen=True)
class PairInputs:
    """The row, and what belongs to what.

    Attributes:
        row: All readings.
        masked: Places in the row that the masked-language loss is taken on, int64 [num_masked].
        truth: True tokens there, int64 [num_masked].
        scores: Number of the score each reading belongs to, int64 [num_readings].
        num_scores: Scores of all examples together, as many for each.
        left_out: Residues of each example that no reading has, int64 [num_examples].
    """

    row: PairBatch
    masked: Tensor
    truth: Tensor
    scores: Tensor
    num_scores: int
    left_out: Tensor

    def to(self, device: torch.device) -> PairInputs:
        """Return the same on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("masked", "truth", "scores", "left_out")
        }
        return replace(self, row=self.row.to(device), **moved)


def gather_pairs(
    vocabulary: Vocabulary,
    readings: Sequence[Reading],
    left_out: Sequence[int],
    mask_rate: float = 0.0,
    seed: int = 0,
) -> PairInputs:
    """Return readings as one row on the CPU.

    Args:
        vocabulary: The encoder's.
        readings: In any order; those of one length side by side run fastest.
        left_out: Residues of each example that no reading has.
        mask_rate: Share of residues masked, 80 % by the mask token, 10 % by another residue, 10 % as they are.
        seed: Of the masks, which do not depend on the other readings.
    """
    row = pack_pairs(vocabulary, [(reading.first, reading.second) for reading in readings])
    masked = truth = torch.empty(0, dtype=torch.long)
    if mask_rate:
        tokens, masked, truth = _masked(vocabulary, row, [reading.stream for reading in readings], mask_rate, seed)
        row = replace(row, tokens=tokens)
    scores = torch.tensor([reading.score for reading in readings])
    return PairInputs(row, masked, truth, scores, int(scores.max()) + 1, torch.tensor(left_out))


def _masked(
    vocabulary: Vocabulary, row: PairBatch, streams: Sequence[int], mask_rate: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masked tokens of a row, the masked places and what stood there.

    Masking knows sequences of one boundary token and residues. A pair is two or three of them: each boundary token
    begins one, and the last has no residues.
    """
    starts = np.flatnonzero(~row.is_residue.numpy())
    bounds = np.append(starts, len(row.tokens)).astype(np.int32)
    unmasked = UnmaskedRow(row.tokens.numpy(), row.positions.numpy(), bounds, len(starts))
    pair_keys = keys(key(seed, _MASKS), np.array(streams, dtype=np.int64))[row.sequence.numpy()[starts]]
    part_keys = pair_keys + row.is_second.numpy()[starts].astype(np.uint64)
    whole = replace(vocabulary, end=-1)  # so that one boundary token a sequence is assumed
    return mask_row(unmasked, part_keys, MaskingConfig(mask_probability=mask_rate), whole)
