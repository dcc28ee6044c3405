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
    MaskedTokens,
    MaskingConfig,
    content_keys,
    mask_tokens,
    masked_capacity,
)
from megaprot.common.packing import UnmaskedRow, lay_out_row
from megaprot.common.vocabulary import Vocabulary, get_vocabulary

ESM = get_vocabulary("esm")
WORD = 2**64


def packed(lengths: list[int], vocabulary: Vocabulary, row_tokens: int, seed: int = 0) -> UnmaskedRow:
    """A row of sequences of random standard residues."""
    residues = np.random.default_rng(seed).choice(vocabulary.standard_residues, sum(lengths)).astype(np.uint8)
    sizes = np.array(lengths, dtype=np.int64)
    return lay_out_row(residues, np.cumsum(sizes) - sizes, sizes, row_tokens, vocabulary)


def masked(
    row: UnmaskedRow, residue_keys: NDArray[np.uint64], config: MaskingConfig, vocabulary: Vocabulary, capacity: int
) -> MaskedTokens:
    return mask_tokens(
        row.tokens, row.residue_positions, residue_keys, row.residue_counters, config, vocabulary, capacity
    )


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
    seed=st.integers(0, 2**32),
)
def test_masks_are_what_a_loop_over_residues_draws(
    name: str, lengths: list[int], probability: float, fractions: tuple[float, float], seed: int
) -> None:
    vocabulary = get_vocabulary(name)
    row = packed(lengths, vocabulary, 220, seed)
    sequence_keys = [int(value) for value in keys(key(seed), np.arange(len(lengths)))]
    found = masked(
        row,
        np.repeat(np.array(sequence_keys, dtype=np.uint64), lengths),
        MaskingConfig(probability, *fractions),
        vocabulary,
        capacity=256,
    )
    tokens = row.tokens.tolist()
    positions, labels, kinds = [], [], []
    at = 0
    for state, length in zip(sequence_keys, lengths, strict=True):
        for residue in range(length):
            place = int(row.residue_positions[at])
            at += 1
            if python_bits(state, 2 * residue) >> 32 >= round(probability * 2**32):
                continue
            draw = python_bits(state, 2 * residue + 1)
            positions.append(place)
            labels.append(tokens[place])
            if draw >> 32 < round(fractions[0] * 2**32):
                kinds.append(MASK_TOKEN)
                tokens[place] = vocabulary.mask
            elif draw >> 32 < round(fractions[0] * 2**32) + round(fractions[1] * 2**32):
                kinds.append(RANDOM_RESIDUE)
                tokens[place] = vocabulary.standard_residues[(draw % 2**32) * 20 >> 32]
            else:
                kinds.append(KEPT)
    unused = 256 - len(positions)
    assert found.tokens.tolist() == tokens
    assert found.masked_positions.tolist() == positions + [0] * unused
    assert found.labels.tolist() == labels + [vocabulary.pad] * unused
    assert found.masked_kind.tolist() == kinds + [0] * unused


def test_shares_are_the_asked_ones_within_sampling_error() -> None:
    lengths = [300] * 1000
    row = packed(lengths, ESM, 1000 * 302)
    found = masked(row, np.repeat(keys(key(9), np.arange(1000)), lengths), MaskingConfig(), ESM, capacity=300_000)
    counts = np.bincount(found.masked_kind, minlength=4)
    num_masked = int(counts[1:].sum())

    def deviations(count: int, trials: int, probability: float) -> float:
        return abs(count - trials * probability) / math.sqrt(trials * probability * (1 - probability))

    assert deviations(num_masked, 300_000, 0.15) < 5
    for kind, share in ((MASK_TOKEN, 0.8), (RANDOM_RESIDUE, 0.1), (KEPT, 0.1)):
        assert deviations(int(counts[kind]), num_masked, share) < 5
    replaced = found.masked_positions[found.masked_kind == RANDOM_RESIDUE]
    drawn = np.bincount(found.tokens[replaced], minlength=ESM.size)[list(ESM.standard_residues)]
    assert drawn.sum() == len(replaced)  # nothing but standard residues
    assert ((drawn - len(replaced) / 20) ** 2 / (len(replaced) / 20)).sum() < 60  # chi-square, 19 degrees of freedom


def test_neighbouring_residues_and_sequences_are_masked_independently() -> None:
    row = packed([256] * 400, ESM, 400 * 258)
    found = masked(row, np.repeat(keys(key(4), np.arange(400)), 256), MaskingConfig(), ESM, capacity=120_000)
    is_masked = np.zeros(len(row.tokens), dtype=bool)
    is_masked[found.masked_positions[found.masked_kind > 0]] = True
    grid = is_masked[row.residue_positions].reshape(400, 256).astype(float)
    for shifted in (grid[:, 1:], grid[1:]):
        other = grid[:, :-1] if shifted.shape[0] == 400 else grid[:-1]
        assert abs(np.corrcoef(shifted.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(shifted.size)


def test_special_and_padding_tokens_are_never_masked_even_when_every_residue_is() -> None:
    row = packed([10, 1, 20], ESM, 64)
    found = masked(row, np.repeat(keys(key(0), np.arange(3)), [10, 1, 20]), MaskingConfig(1.0, 1.0, 0.0), ESM, 64)
    assert found.masked_positions[:31].tolist() == row.residue_positions.tolist()
    special = np.setdiff1d(np.arange(64), row.residue_positions)
    assert np.array_equal(found.tokens[special], row.tokens[special])
    assert set(row.tokens[special].tolist()) == {ESM.begin, ESM.end, ESM.pad}
    assert not (found.tokens[row.residue_positions] != ESM.mask).any()


def test_masking_leaves_the_given_tokens_alone() -> None:
    row = packed([50], ESM, 52)
    before = row.tokens.copy()
    masked(row, np.repeat(key(1), 50), MaskingConfig(0.5), ESM, 64)
    assert np.array_equal(row.tokens, before)


def test_what_exceeds_the_capacity_stays_unmasked_at_the_end_of_the_row() -> None:
    row = packed([100], ESM, 102)
    residue_keys = np.repeat(key(2), 100)
    whole = masked(row, residue_keys, MaskingConfig(0.5), ESM, 128)
    cut = masked(row, residue_keys, MaskingConfig(0.5), ESM, 16)
    assert np.count_nonzero(whole.masked_kind) > 16
    assert cut.masked_positions.tolist() == whole.masked_positions[:16].tolist()
    after = whole.masked_positions[16]
    assert np.array_equal(cut.tokens[after:], row.tokens[after:])
    assert np.array_equal(cut.tokens[:after], whole.tokens[:after])


def test_a_blank_row_has_nothing_masked() -> None:
    row = packed([], ESM, 32)
    found = masked(row, np.empty(0, dtype=np.uint64), MaskingConfig(), ESM, 64)
    assert not found.masked_kind.any()
    assert set(found.tokens.tolist()) == {ESM.pad}


@pytest.mark.parametrize(
    ("row_tokens", "probability", "multiple", "expected"),
    [
        (2048, 0.15, 64, 448),  # 307.2 + 8 * 16.16 = 436.5
        (2048, 0.15, 1, 437),
        (8192, 0.15, 64, 1536),  # 1228.8 + 8 * 32.32 = 1487.3
        (100, 1.0, 64, 128),  # no deviation
    ],
)
def test_capacity_is_the_expectation_and_eight_deviations_rounded_up(
    row_tokens: int, probability: float, multiple: int, expected: int
) -> None:
    assert masked_capacity(row_tokens, probability, multiple) == expected


sequences = st.lists(st.lists(st.integers(0, 32), min_size=1, max_size=20), min_size=1, max_size=6)


@given(sequences)
def test_a_content_key_depends_on_its_sequence_alone(pieces: list[list[int]]) -> None:
    flat = np.concatenate(pieces).astype(np.uint8)
    together = content_keys(flat, np.array([len(piece) for piece in pieces]))
    alone = [content_keys(np.array(piece), np.array([len(piece)]))[0] for piece in pieces]
    assert together.tolist() == alone
    assert len(set(alone)) == len({tuple(piece) for piece in pieces})


def test_content_keys_tell_order_length_and_every_residue_apart() -> None:
    base = [5, 6, 7, 8, 9, 5]
    variants = [base, base[::-1], base[:-1], [*base, 5], [0, *base]]
    variants += [[*base[:place], 20, *base[place + 1 :]] for place in range(len(base))]
    found = {int(content_keys(np.array(variant), np.array([len(variant)]))[0]) for variant in variants}
    assert len(found) == len(variants)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((0.0, 0.8, 0.1), "data.mask_probability is 0.0"),
        ((1.5, 0.8, 0.1), "data.mask_probability is 1.5"),
        ((float("nan"), 0.8, 0.1), "data.mask_probability is nan"),
        ((0.15, -0.1, 0.1), "data.mask_token_fraction is -0.1"),
        ((0.15, 0.8, 2.0), "data.random_fraction is 2"),
        ((0.15, 0.8, 0.3), "add up to 1.1"),
    ],
)
def test_values_that_are_no_probabilities_are_refused_by_name(values: tuple[float, float, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MaskingConfig(*values)
