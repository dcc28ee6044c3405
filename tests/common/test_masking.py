"""Masks against a loop in Python's integers and against the binomial distribution."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megaprot.common.counter_random import key, keys
from megaprot.common.errors import InputError
from megaprot.common.masking import (
    KEPT,
    MASK_TOKEN,
    RANDOM_RESIDUE,
    MaskingConfig,
    mask_tokens,
    masked_capacity,
)
from megaprot.common.packing import UnmaskedRow, lay_out_row
from megaprot.common.vocabulary import Vocabulary, get_vocabulary

ESM = get_vocabulary("esm")
WORD = 2**64


def packed(lengths: list[int], vocabulary: Vocabulary, row_tokens: int, seed: int = 0) -> UnmaskedRow:
    """A row of sequences of random standard residues."""
    residues = np.random.default_rng(seed).choice(vocabulary.replacements, sum(lengths)).astype(np.uint8)
    sizes = np.array(lengths, dtype=np.int64)
    return lay_out_row(residues, np.cumsum(sizes) - sizes, sizes, row_tokens, vocabulary)


def residue_places(row: UnmaskedRow, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Where the residues stand in a row, in order."""
    ends = row.cu_seqlens[1 : row.num_sequences + 1] - (vocabulary.end >= 0)
    starts = row.cu_seqlens[: row.num_sequences] + 1
    places = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([np.empty(0, dtype=np.int64), *places])


def python_bits(state: int, counter: int) -> int:
    """Output ``counter`` of SplitMix64."""
    value = (state + (counter + 1) * 0x9E3779B97F4A7C15) % WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


@given(
    name=st.sampled_from(["esm", "iupac", "proteinlm"]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    probability=st.floats(0.01, 1),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: sum(pair) <= 1),
    mean_span_length=st.sampled_from([1.0, 1.5, 3.8, 10.0]),
    seed=st.integers(0, 2**32),
)
def test_masks_are_what_a_loop_over_residues_draws(
    name: str,
    lengths: list[int],
    probability: float,
    fractions: tuple[float, float],
    mean_span_length: float,
    seed: int,
) -> None:
    vocabulary = get_vocabulary(name)
    row = packed(lengths, vocabulary, 220, seed)
    sequence_keys = [int(value) for value in keys(key(seed), np.arange(len(lengths)))]
    masking = MaskingConfig(probability, *fractions, mean_span_length)
    found = mask_tokens(row, np.array(sequence_keys, dtype=np.uint64), masking, vocabulary, capacity=256)
    tokens = row.tokens.tolist()
    places = iter(residue_places(row, vocabulary).tolist())
    survival = [1.0]
    while mean_span_length > 1 and len(survival) < 10:
        survival.append(survival[-1] * (1 - 1 / mean_span_length))
    positions, labels, kinds = [], [], []
    for state, length in zip(sequence_keys, lengths, strict=True):
        covered = set()  # by spans that start at any residue, those before the first included
        for residue in range(1 - len(survival), length):
            draw = python_bits(state, 2 * residue % WORD) >> 32
            span = sum(draw < round(masking.start_probability * share * 2**32) for share in survival)
            covered |= set(range(residue, residue + span))
        for residue in range(length):
            place = next(places)
            if residue not in covered:
                continue
            draw = python_bits(state, 2 * residue + 1)
            positions.append(place)
            labels.append(tokens[place])
            if draw >> 32 < round(fractions[0] * 2**32):
                kinds.append(MASK_TOKEN)
                tokens[place] = vocabulary.mask
            elif draw >> 32 < round((fractions[0] + fractions[1]) * 2**32):
                kinds.append(RANDOM_RESIDUE)
                tokens[place] = vocabulary.replacements[(draw % 2**32) * 20 >> 32]
            else:
                kinds.append(KEPT)
    unused = 256 - len(positions)
    assert found.tokens.tolist() == tokens
    assert found.masked_positions.tolist() == positions + [len(row.tokens) - 1] * unused
    assert found.labels.tolist() == labels + [vocabulary.pad] * unused
    assert found.masked_kind.tolist() == kinds + [0] * unused


def test_shares_are_the_asked_ones_within_sampling_error() -> None:
    lengths = [300] * 1000
    row = packed(lengths, ESM, 1000 * 302)
    found = mask_tokens(row, keys(key(9), np.arange(1000)), MaskingConfig(), ESM, capacity=300_000)
    counts = np.bincount(found.masked_kind, minlength=4)
    num_masked = int(counts[1:].sum())

    def deviations(count: int, trials: int, probability: float) -> float:
        return abs(count - trials * probability) / math.sqrt(trials * probability * (1 - probability))

    assert deviations(num_masked, 300_000, 0.15) < 5
    for kind, share in ((MASK_TOKEN, 0.8), (RANDOM_RESIDUE, 0.1), (KEPT, 0.1)):
        assert deviations(int(counts[kind]), num_masked, share) < 5
    replaced = found.masked_positions[found.masked_kind == RANDOM_RESIDUE]
    drawn = np.bincount(found.tokens[replaced], minlength=ESM.size)[list(ESM.replacements)]
    assert drawn.sum() == len(replaced)  # nothing but standard residues
    assert ((drawn - len(replaced) / 20) ** 2 / (len(replaced) / 20)).sum() < 60  # chi-square, 19 degrees of freedom


def test_neighbouring_residues_and_sequences_are_masked_independently() -> None:
    row = packed([256] * 400, ESM, 400 * 258)
    found = mask_tokens(row, keys(key(4), np.arange(400)), MaskingConfig(), ESM, capacity=120_000)
    is_masked = np.zeros(len(row.tokens), dtype=bool)
    is_masked[found.masked_positions[found.masked_kind > 0]] = True
    grid = is_masked[residue_places(row, ESM)].reshape(400, 256).astype(float)
    for shifted in (grid[:, 1:], grid[1:]):
        other = grid[:, :-1] if shifted.shape[0] == 400 else grid[:-1]
        assert abs(np.corrcoef(shifted.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(shifted.size)


def test_special_and_padding_tokens_are_never_masked_even_when_every_residue_is() -> None:
    row = packed([10, 1, 20], ESM, 64)
    found = mask_tokens(row, keys(key(0), np.arange(3)), MaskingConfig(1.0, 1.0, 0.0), ESM, 64)
    residues = residue_places(row, ESM)
    assert found.masked_positions[:31].tolist() == residues.tolist()
    special = np.setdiff1d(np.arange(64), residues)
    assert np.array_equal(found.tokens[special], row.tokens[special])
    assert set(row.tokens[special].tolist()) == {ESM.begin, ESM.end, ESM.pad}
    assert not (found.tokens[residues] != ESM.mask).any()


def test_masking_leaves_the_given_tokens_alone() -> None:
    row = packed([50], ESM, 52)
    before = row.tokens.copy()
    mask_tokens(row, keys(key(1), np.arange(1)), MaskingConfig(0.5), ESM, 64)
    assert np.array_equal(row.tokens, before)


def test_what_exceeds_the_capacity_stays_unmasked_at_the_end_of_the_row() -> None:
    row = packed([100], ESM, 102)
    sequence_keys = keys(key(2), np.arange(1))
    whole = mask_tokens(row, sequence_keys, MaskingConfig(0.5), ESM, 128)
    cut = mask_tokens(row, sequence_keys, MaskingConfig(0.5), ESM, 16)
    assert np.count_nonzero(whole.masked_kind) > 16
    assert cut.masked_positions.tolist() == whole.masked_positions[:16].tolist()
    after = whole.masked_positions[16]
    assert np.array_equal(cut.tokens[after:], row.tokens[after:])
    assert np.array_equal(cut.tokens[:after], whole.tokens[:after])


def test_a_blank_row_has_nothing_masked() -> None:
    row = packed([], ESM, 32)
    found = mask_tokens(row, np.empty(0, dtype=np.uint64), MaskingConfig(), ESM, 64)
    assert not found.masked_kind.any()
    assert set(found.tokens.tolist()) == {ESM.pad}


@pytest.mark.parametrize(
    ("row_tokens", "masking", "multiple", "expected"),
    [
        (2048, MaskingConfig(), 64, 448),  # 307.2 + 8 * 16.16 = 436.5
        (2048, MaskingConfig(), 1, 437),
        (8192, MaskingConfig(), 64, 1536),  # 1228.8 + 8 * 32.32 = 1487.3
        (100, MaskingConfig(1.0), 64, 128),  # no deviation
        (2048, MaskingConfig(mean_span_length=3.0), 1, 597),  # 307.2 + 8 * 16.16 * sqrt(5) = 596.3
    ],
)
def test_capacity_is_the_expectation_and_eight_deviations_rounded_up(
    row_tokens: int, masking: MaskingConfig, multiple: int, expected: int
) -> None:
    assert masked_capacity(row_tokens, masking, multiple) == expected


@pytest.mark.parametrize(("mean", "cut_mean"), [(2.0, 1.998), (3.8, 3.621), (10.0, 6.513)])
def test_spans_mask_the_asked_share_of_residues_wherever_they_stand(mean: float, cut_mean: float) -> None:
    row = packed([40] * 6000, ESM, 6000 * 42)
    masking = MaskingConfig(0.15, mean_span_length=mean)
    found = mask_tokens(row, keys(key(3), np.arange(6000)), masking, ESM, capacity=100_000)
    is_masked = np.zeros(len(row.tokens), dtype=bool)
    is_masked[found.masked_positions[found.masked_kind > 0]] = True
    grid = is_masked[residue_places(row, ESM)].reshape(6000, 40)
    for place in (0, 1, 9, 20, 39):  # the first residues no less than the others
        assert abs(grid[:, place].mean() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 6000)
    # started spans, masked or not by another one: expectation of a geometric length cut at 10
    assert sum(masking.span_survival) == pytest.approx(cut_mean, abs=1e-3)
    runs = np.diff(np.pad(grid, ((0, 0), (1, 1))).astype(int), axis=1)
    assert grid.sum() / (runs == 1).sum() > 0.85 * cut_mean  # runs are spans, joined or cut at the ends of sequences


def test_spans_stay_within_the_capacity() -> None:
    masking = MaskingConfig(mean_span_length=3.8)
    capacity = masked_capacity(2048, masking)
    for seed in range(300):
        row = packed([2046], ESM, 2048)
        found = mask_tokens(row, keys(key(seed), np.arange(1)), masking, ESM, capacity)
        assert found.masked_kind[-1] == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((0.0, 0.8, 0.1), "data.mask_probability is 0.0"),
        ((1.5, 0.8, 0.1), "data.mask_probability is 1.5"),
        ((float("nan"), 0.8, 0.1), "data.mask_probability is nan"),
        ((0.15, -0.1, 0.1), "data.mask_token_fraction is -0.1"),
        ((0.15, 0.8, 2.0), "data.random_fraction is 2"),
        ((0.15, 0.8, 0.3), "add up to 1.1"),
        ((0.15, 0.8, 0.1, 0.5), "data.mask_span_length is 0.5: give a number from 1 to 10"),
    ],
)
def test_values_that_are_no_probabilities_are_refused_by_name(values: tuple[float, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MaskingConfig(*values)
