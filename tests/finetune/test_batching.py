"""Batches by a budget of tokens, and the windows of long proteins."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.finetune.batching import centred_window, plan_batches, windows

LENGTHS = st.lists(st.integers(1, 40), max_size=40)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 100), is_padding_free=st.booleans())
def test_every_sequence_is_in_one_batch_within_the_budget(
    lengths: list[int], max_tokens: int, is_padding_free: bool
) -> None:
    batches = plan_batches(lengths, max_tokens, is_padding_free)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        taken = [lengths[number] for number in batch]
        num_tokens = sum(taken) if is_padding_free else max(taken) * len(taken)
        assert num_tokens <= max_tokens or len(batch) == 1
        assert taken == sorted(taken, reverse=True), "equal lengths must stand side by side"


@given(lengths=LENGTHS, max_tokens=st.integers(40, 100), is_padding_free=st.booleans())
def test_a_batch_ends_only_where_the_next_sequence_does_not_fit(
    lengths: list[int], max_tokens: int, is_padding_free: bool
) -> None:
    batches = plan_batches(lengths, max_tokens, is_padding_free)
    for batch, after in itertools.pairwise(batches):
        taken = [lengths[number] for number in [*batch, after[0]]]
        assert (sum(taken) if is_padding_free else max(taken) * len(taken)) > max_tokens


@given(num_residues=st.integers(1, 300), longest=st.integers(1, 60))
def test_windows_cover_a_protein_and_share_a_quarter(num_residues: int, longest: int) -> None:
    found = windows(num_residues, longest)
    covered = set()
    for start, end in found:
        assert 0 <= start < end <= num_residues
        assert end - start == min(longest, num_residues)
        covered |= set(range(start, end))
    assert covered == set(range(num_residues))
    for (_, end), (start, _) in itertools.pairwise(found):
        assert end - start >= longest // 4


def test_windows_by_hand() -> None:
    assert windows(10, 0) == [(0, 10)]
    assert windows(8, 8) == [(0, 8)]
    assert windows(9, 8) == [(0, 8), (1, 9)]
    assert windows(20, 8) == [(0, 8), (6, 14), (12, 20)]


@given(num_residues=st.integers(1, 100), longest=st.integers(1, 60), data=st.data())
def test_a_centred_window_holds_its_position_in_the_middle_or_at_an_end(
    num_residues: int, longest: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, num_residues - 1))
    start, end = centred_window(position, num_residues, longest)
    assert 0 <= start <= position < end <= num_residues
    assert end - start == min(longest, num_residues)
    if start > 0 and end < num_residues:
        assert abs((position - start) - (end - 1 - position)) <= 1


@pytest.mark.parametrize("position", [0, 50, 99])
def test_a_centred_window_without_a_limit_is_the_protein(position: int) -> None:
    assert centred_window(position, 100, 0) == (0, 100)
