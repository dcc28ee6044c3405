"""Masked places of a row on the CPU, as pretraining draws them, and what stood there."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.common.masking import UNUSED, MaskingConfig, mask_tokens
from megaprot.common.packing import UnmaskedRow
from megaprot.common.vocabulary import Vocabulary


def mask_row(
    row: UnmaskedRow, sequence_keys: NDArray[np.uint64], masking: MaskingConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a row's tokens with some masked, the masked places and what stood there, all int64.

    Args:
        row: The tokens as they are.
        sequence_keys: Of each sequence's masks, uint64 [num_sequences].
        masking: How many, and by what.
        vocabulary: The model's.
    """
    found = mask_tokens(row, sequence_keys, masking, vocabulary, len(row.tokens))
    count = int((found.masked_kind != UNUSED).sum())
    places, truth = found.masked_positions[:count], found.labels[:count]
    return torch.from_numpy(found.tokens), torch.from_numpy(places), torch.from_numpy(truth)
