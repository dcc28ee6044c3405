"""BERT's masking (Devlin et al. 2019, as ESM-2 has it): which residues a loss is taken on, and what is shown instead.

Each residue is masked with the same probability, independently; of the masked, 80 % become the mask token, 10 % a
random standard residue and 10 % stay. Draws come from the counter-based generator, keyed by sequence and counted by
residue, so that a sequence's mask does not depend on the row it is packed into. Special tokens are never masked.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import below, mix64, uniform_bits
from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary

UNUSED, MASK_TOKEN, RANDOM_RESIDUE, KEPT = 0, 1, 2, 3  # the values of ``masked_kind``
_HASH_OF_CONTENT = np.uint64(0x4D656761_70726F74)
_CAPACITY_DEVIATIONS = 8


@dataclass(frozen=True)
class MaskingConfig:
    """How many residues are masked, and with what.

    ``mask_probability`` is a residue's chance to be masked. Of those, ``mask_token_fraction`` become the mask token,
    ``random_fraction`` a random standard residue, and the rest stay. Raises InputError for what is no probability.
    """

    mask_probability: float = 0.15
    mask_token_fraction: float = 0.8
    random_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Check the three values."""
        if not 0 < self.mask_probability <= 1:
            raise InputError(f"data.mask_probability is {self.mask_probability}: give a number above 0 and at most 1")
        for name in ("mask_token_fraction", "random_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.{name} is {getattr(self, name)}: give a number from 0 to 1")
        if self.mask_token_fraction + self.random_fraction > 1 + 1e-9:
            raise InputError(
                "data.mask_token_fraction and data.random_fraction add up to "
                f"{self.mask_token_fraction + self.random_fraction:g}: give two numbers whose sum is at most 1"
            )


@dataclass(frozen=True)
class MaskedTokens:
    """What masking made of a row.

    ``tokens`` int64 [row_tokens] is what the model sees. ``masked_positions`` int64, ``labels`` int64 and
    ``masked_kind`` uint8, all [capacity], are in the order of the row; places beyond the masked ones hold 0, the pad
    token and UNUSED.
    """

    tokens: NDArray[np.int64]
    masked_positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    masked_kind: NDArray[np.uint8]


def masked_capacity(row_tokens: int, mask_probability: float, multiple: int = 64) -> int:
    """Return how many masked places a row has: expectation and 8 standard deviations, rounded up to ``multiple``.

    The number is fixed so that shapes are static, and a multiple so that sequence-parallel shards are even.
    """
    expected = row_tokens * mask_probability
    most = expected + _CAPACITY_DEVIATIONS * math.sqrt(expected * (1 - mask_probability))
    return math.ceil(most / multiple) * multiple


def content_keys(residues: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return one key for each of the sequences that lie end to end in ``residues``, from its content alone.

    ``lengths`` are all at least 1. Equal sequences have equal keys, whatever stands beside them.
    """
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(residues)) - np.repeat(starts, lengths)
    sums = np.add.reduceat(uniform_bits(mix64(residues.astype(np.uint64)), places), starts)
    return mix64(sums ^ _HASH_OF_CONTENT)


def mask_tokens(
    tokens: NDArray[np.int64],
    residue_positions: NDArray[np.int64],
    residue_keys: NDArray[np.uint64],
    residue_counters: NDArray[np.int64],
    config: MaskingConfig,
    vocabulary: Vocabulary,
    capacity: int,
) -> MaskedTokens:
    """Mask a row at some of ``residue_positions`` [num_residues, ascending]; ``tokens`` [row_tokens] is left as it is.

    ``residue_keys`` [num_residues] is the key of each residue's sequence, ``residue_counters`` [num_residues] its place
    in that sequence. If more than ``capacity`` residues are drawn (8 standard deviations, or many copies of one
    sequence under one key), the last of the row stay unmasked and have no loss.
    """
    drawn = uniform_bits(residue_keys, 2 * residue_counters) >> np.uint64(32)
    chosen = np.flatnonzero(drawn < np.uint64(round(config.mask_probability * 2**32)))[:capacity]
    bits = uniform_bits(residue_keys[chosen], 2 * residue_counters[chosen] + 1)  # upper half: kind; lower: residue
    use = bits >> np.uint64(32)
    mask_below = round(config.mask_token_fraction * 2**32)
    random_below = min(mask_below + round(config.random_fraction * 2**32), 2**32)
    kind = np.where(use < np.uint64(random_below), RANDOM_RESIDUE, KEPT)
    kind[use < np.uint64(mask_below)] = MASK_TOKEN
    standard = np.array(vocabulary.standard_residues, dtype=np.int64)
    random_residues = standard[below(bits << np.uint64(32), len(standard))]

    places = residue_positions[chosen]
    truth = tokens[places]
    shown = np.where(kind == MASK_TOKEN, vocabulary.mask, np.where(kind == RANDOM_RESIDUE, random_residues, truth))
    masked = MaskedTokens(
        tokens=tokens.copy(),
        masked_positions=np.zeros(capacity, dtype=np.int64),
        labels=np.full(capacity, vocabulary.pad, dtype=np.int64),
        masked_kind=np.zeros(capacity, dtype=np.uint8),
    )
    masked.tokens[places] = shown
    masked.masked_positions[: len(chosen)] = places
    masked.labels[: len(chosen)] = truth
    masked.masked_kind[: len(chosen)] = kind
    return masked
