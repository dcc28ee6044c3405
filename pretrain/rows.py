"""One packed, masked row from the sequences of a corpus: a pure function of its seed, the epoch and their numbers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaprot.common.content_hash import content_hashes
from megaprot.common.counter_random import below, key, keys, uniform_bits
from megaprot.common.masking import MaskingConfig, mask_tokens
from megaprot.common.packing import PackedRow, lay_out_row
from megaprot.pretrain.corpus import Corpus

# What a key is drawn for, apart from the orders that ``megaprot.common.packing_plan`` draws.
_CROP, _MASK = 3, 4


@dataclass(frozen=True)
class RowShape:
    """What rows are like: tokens of a row, longest sequence in tokens, masking, and places for masked positions."""

    row_tokens: int
    max_sequence_length: int
    masking: MaskingConfig
    masked_capacity: int


@dataclass(frozen=True)
class RowBuilder:
    """Builds the row that holds given sequences of a corpus. Small to send to another process.

    Crops and masks are drawn from (``seed``, epoch, sequence number) or, if ``by_content``, from the residues alone.
    """

    corpus: Corpus
    shape: RowShape
    seed: int
    by_content: bool

    def build(self, epoch: int, sequence_ids: NDArray[np.int64]) -> PackedRow:
        """Return the row of ``sequence_ids`` [num_sequences], which must fit it; no sequences make a blank row."""
        vocabulary = self.corpus.vocabulary
        residues = np.asarray(self.corpus.residues)
        starts, lengths = self._pieces(epoch, sequence_ids)
        row = lay_out_row(residues, starts, lengths, self.shape.row_tokens, vocabulary)
        if self.by_content:
            sequence_keys = _content_keys(residues, starts, lengths)
        else:
            sequence_keys = keys(key(_MASK, self.seed, epoch), sequence_ids)
        masked = mask_tokens(row, sequence_keys, self.shape.masking, vocabulary, self.shape.masked_capacity)
        return PackedRow(
            tokens=masked.tokens,
            positions=row.positions,
            cu_seqlens=row.cu_seqlens,
            num_sequences=row.num_sequences,
            masked_positions=masked.masked_positions,
            labels=masked.labels,
            masked_kind=masked.masked_kind,
            num_residues=int(lengths.sum()),
        )

    def _pieces(self, epoch: int, sequence_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each sequence is read in the corpus and how many residues of it, too long ones being cropped."""
        lengths = self.corpus.lengths[sequence_ids].astype(np.int64)
        starts = self.corpus.offsets[sequence_ids].astype(np.int64)
        room = self.shape.max_sequence_length - self.corpus.vocabulary.num_boundary_tokens
        too_long = np.flatnonzero(lengths > room)
        if len(too_long):
            if self.by_content:
                crop_keys = _content_keys(np.asarray(self.corpus.residues), starts[too_long], lengths[too_long])
            else:
                crop_keys = keys(key(_CROP, self.seed, epoch), sequence_ids[too_long])
            draws = uniform_bits(crop_keys, np.zeros(len(too_long), dtype=np.int64))
            starts[too_long] += below(draws, lengths[too_long] - room + 1)
            lengths[too_long] = room
        return starts, lengths


def _content_keys(
    residues: NDArray[np.integer], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return the content hash of each piece ``residues[starts[s] : starts[s] + lengths[s]]``."""
    pieces = [residues[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    together = np.concatenate([np.empty(0, dtype=residues.dtype), *pieces])
    return content_hashes(together, np.concatenate(([0], np.cumsum(lengths))))
