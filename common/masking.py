"""BERT's masking (Devlin et al. 2019, as ESM-2 has it): which residues a loss is taken on, and what is shown instead.

Each residue is masked with the same probability, independently or in spans (SpanBERT, Joshi et al. 2020); of the
masked, 80 % become the mask token, 10 % a random standard residue and 10 % stay. Draws come from the counter-based
generator, keyed by sequence and counted by residue, so that a sequence's mask does not depend on the row it is packed
into. Special tokens are never masked.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import scalar_bits
from megaprot.common.errors import InputError
from megaprot.common.packing import UnmaskedRow
from megaprot.common.vocabulary import Vocabulary

UNUSED, MASK_TOKEN, RANDOM_RESIDUE, KEPT = 0, 1, 2, 3  # the values of ``masked_kind``
LONGEST_SPAN = 10  # residues, as in SpanBERT
_CAPACITY_DEVIATIONS = 8


@dataclass(frozen=True)
class MaskingConfig:
    """How many residues are masked, and with what.

    ``mask_probability`` is a residue's chance to be masked. Of those, ``mask_token_fraction`` become the mask token,
    ``random_fraction`` a random standard residue, and the rest stay. ``mean_span_length`` 1 masks residues
    independently; above 1 masked residues come in spans of geometric length, cut at LONGEST_SPAN, whose mean this is
    before the cut.
    Raises InputError for what is no probability or length.
    """

    mask_probability: float = 0.15
    mask_token_fraction: float = 0.8
    random_fraction: float = 0.1
    mean_span_length: float = 1.0

    def __post_init__(self) -> None:
        """Check the four values."""
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
        if not 1 <= self.mean_span_length <= LONGEST_SPAN:
            raise InputError(
                f"data.mask_span_length is {self.mean_span_length}: give a number from 1 to {LONGEST_SPAN}"
            )

    @cached_property
    def span_survival(self) -> tuple[float, ...]:
        """The chance that a span has more than 0, 1, 2, ... residues; (1.0,) where spans are single residues."""
        going_on, survival = 1 - 1 / self.mean_span_length, [1.0]
        while going_on > 0 and len(survival) < LONGEST_SPAN:
            survival.append(survival[-1] * going_on)
        return tuple(survival)

    @cached_property
    def start_probability(self) -> float:
        """The chance that a span starts at a residue, such that residues are masked with ``mask_probability``.

        A residue stays unmasked where no span starts at it, nor at one of the residues before it and reaches it. Those
        chances multiply; the start that gives the wanted product is found by bisection.
        """
        if len(self.span_survival) == 1:
            return self.mask_probability
        low, high = 0.0, self.mask_probability
        for _ in range(60):
            middle = (low + high) / 2
            unmasked = math.prod(1 - middle * survival for survival in self.span_survival)
            low, high = (middle, high) if 1 - unmasked < self.mask_probability else (low, middle)
        return high

    @cached_property
    def thresholds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What 32 random bits are held against: is a span of more than 0, 1, ... residues begun; is a residue given the
        mask token, or that or a random residue.
        """
        starts = [self.start_probability * survival for survival in self.span_survival]
        kinds = [self.mask_token_fraction, self.mask_token_fraction + self.random_fraction]
        return tuple(np.array([round(share * 2**32) for share in shares]) for shares in (starts, kinds))  # type: ignore


@dataclass(frozen=True)
class MaskedTokens:
    """What masking made of a row.

    ``tokens`` int64 [row_tokens] is what the model sees. ``masked_positions`` int64, ``labels`` int64 and
    ``masked_kind`` uint8, all [capacity], are in the order of the row; places beyond the masked ones hold the row's
    last position, the pad token and UNUSED.
    """

    tokens: NDArray[np.int64]
    masked_positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    masked_kind: NDArray[np.uint8]


def masked_capacity(row_tokens: int, masking: MaskingConfig, multiple: int = 64) -> int:
    """Return how many masked places a row has: expectation and 8 standard deviations, rounded up to ``multiple``.

    The number is fixed so that shapes are static, and a multiple so that sequence-parallel shards are even. Residues of
    a span are masked together, which widens the spread as if there were fewer of them.
    """
    probability = masking.mask_probability
    expected = row_tokens * probability
    variance = expected * (1 - probability) * (2 * masking.mean_span_length - 1)
    return math.ceil((expected + _CAPACITY_DEVIATIONS * math.sqrt(variance)) / multiple) * multiple


def mask_tokens(
    row: UnmaskedRow,
    sequence_keys: NDArray[np.uint64],
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    capacity: int,
) -> MaskedTokens:
    """Mask some residues of a row, which is left as it is; ``sequence_keys`` [num_sequences] keys their draws.

    If more than ``capacity`` residues are drawn (8 standard deviations, or many copies of one sequence under one key),
    the last of the row stay unmasked and have no loss.
    """
    masked = MaskedTokens(
        tokens=row.tokens.copy(),
        masked_positions=np.full(capacity, len(row.tokens) - 1, dtype=np.int64),
        labels=np.full(capacity, vocabulary.pad, dtype=np.int64),
        masked_kind=np.zeros(capacity, dtype=np.uint8),
    )
    _mask(
        row.cu_seqlens[: row.num_sequences + 1],
        vocabulary.num_boundary_tokens,
        sequence_keys,
        *masking.thresholds,
        np.array(vocabulary.replacements, dtype=np.int64),
        vocabulary.mask,
        masked.tokens,
        masked.masked_positions,
        masked.labels,
        masked.masked_kind,
    )
    return masked


@numba.njit(cache=True, nogil=True)
def _mask(
    bounds: NDArray[np.int32],
    num_boundary_tokens: int,
    keys: NDArray[np.uint64],
    starts_below: NDArray[np.int64],
    kinds_below: NDArray[np.int64],
    replacements: NDArray[np.int64],
    mask: int,
    tokens: NDArray[np.int64],
    places: NDArray[np.int64],
    labels: NDArray[np.int64],
    kinds: NDArray[np.uint8],
) -> None:
    """Draw and write the masks of a row; native because rows are built as fast as they are read.

    Draw 2r of a sequence's stream (its upper 32 bits, against ``starts_below``) says whether a span starts at residue
    r, and, by the thresholds it stays below, how many residues it has. Draws for the residues that would stand
    before the first make it as likely to be masked as the others. Draw 2r + 1 says what is shown: its upper half the
    kind, its lower half the random residue.
    """
    num_masked, longest = 0, len(starts_below)
    for sequence in range(len(bounds) - 1):
        first = bounds[sequence] + 1
        masked_up_to = 0
        for residue in range(1 - longest, bounds[sequence + 1] - first - num_boundary_tokens + 1):
            draw = np.int64(scalar_bits(keys[sequence], 2 * residue) >> np.uint64(32))
            if draw < starts_below[0]:
                span = 1
                while span < longest and draw < starts_below[span]:
                    span += 1
                masked_up_to = max(masked_up_to, residue + span)
            if residue < 0 or residue >= masked_up_to:
                continue
            if num_masked == len(places):
                return
            place = first + residue
            truth = tokens[place]
            bits = scalar_bits(keys[sequence], 2 * residue + 1)
            use = np.int64(bits >> np.uint64(32))
            kind = MASK_TOKEN if use < kinds_below[0] else RANDOM_RESIDUE if use < kinds_below[1] else KEPT
            if kind == MASK_TOKEN:
                tokens[place] = mask
            elif kind == RANDOM_RESIDUE:
                chosen = (bits & np.uint64(0xFFFFFFFF)) * np.uint64(len(replacements)) >> np.uint64(32)
                tokens[place] = replacements[np.int64(chosen)]
            places[num_masked], labels[num_masked], kinds[num_masked] = place, truth, kind
            num_masked += 1
