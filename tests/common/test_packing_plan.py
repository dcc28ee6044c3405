"""Plans against naive loops."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megaprot.common.counter_random import key
from megaprot.common.errors import InputError
from megaprot.common.packing_plan import PackingPlan, _best_fit, _shuffle, plan_epoch


def protein_lengths(mean: float, num_sequences: int) -> NDArray[np.int64]:
    """Log-normal lengths with the given mean and the spread that protein databases show."""
    spread = 0.8
    generator = np.random.default_rng(0)
    return generator.lognormal(np.log(mean) - spread**2 / 2, spread, num_sequences).astype(np.int64) + 1


def tokens_of_rows(plan: PackingPlan, num_tokens: NDArray[np.int64]) -> list[int]:
    return [int(num_tokens[plan.row(row)].sum()) for row in range(plan.num_rows)]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=700),
    row_tokens=st.integers(3, 130),
    cut=st.integers(0, 100),
    boundary=st.integers(1, 2),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10),
)
def test_every_sequence_is_in_one_row_and_rows_hold_no_more_than_they_can(
    lengths: list[int], row_tokens: int, cut: int, boundary: int, seed: int, epoch: int
) -> None:
    longest = max(boundary + 1, row_tokens - cut)
    plan = plan_epoch(np.array(lengths, dtype=np.int32), row_tokens, longest, boundary, seed, epoch)
    assert sorted(plan.sequence_ids.tolist()) == list(range(len(lengths)))
    assert plan.row_starts[0] == 0
    assert plan.row_starts[-1] == len(lengths)
    filled = tokens_of_rows(plan, np.minimum(np.array(lengths, dtype=np.int64) + boundary, longest))
    assert all(0 < tokens <= row_tokens for tokens in filled)
    # best fit opens a row only when no other takes the sequence, so no two rows could be one
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > row_tokens


@pytest.mark.parametrize("mean", [158, 340])
@pytest.mark.parametrize(("row_tokens", "longest"), [(2048, 2048), (2048, 1024), (1024, 1024), (512, 512)])
def test_padding_is_at_most_one_in_a_hundred_tokens(mean: float, row_tokens: int, longest: int) -> None:
    lengths = protein_lengths(mean, 12_000)
    plan = plan_epoch(lengths, row_tokens, longest, 2, seed=1234, epoch=0)
    used = np.minimum(lengths + 2, longest).sum()
    assert 1 - used / (plan.num_rows * row_tokens) <= 0.01


def test_planning_is_quick() -> None:
    lengths = protein_lengths(158, 50_000)
    start = time.process_time()
    plan_epoch(lengths, 2048, 1024, 2, seed=0, epoch=0)
    assert time.process_time() - start < 8  # about 0.005 s, and 4 s of compilation the first time


def test_a_plan_depends_on_seed_and_epoch_and_nothing_else() -> None:
    lengths = protein_lengths(158, 2_000)

    def ids(seed: int, epoch: int) -> list[int]:
        return plan_epoch(lengths, 1024, 1024, 2, seed, epoch).sequence_ids.tolist()

    assert ids(1, 0) == ids(1, 0)
    assert len({tuple(ids(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_neither_length_nor_place_in_the_corpus_leads_along_the_epoch() -> None:
    lengths = np.sort(protein_lengths(200, 20_000))
    plan = plan_epoch(lengths, 2048, 2048, 2, seed=3, epoch=0)
    mean_lengths = [lengths[plan.row(row)].mean() for row in range(plan.num_rows)]
    mean_places = [plan.row(row).mean() for row in range(plan.num_rows)]
    for means in (mean_lengths, mean_places):
        # a correlation of unrelated rows has standard deviation 1 / sqrt(rows)
        assert abs(np.corrcoef(np.arange(plan.num_rows), means)[0, 1]) < 5 / plan.num_rows**0.5


@pytest.mark.parametrize(
    ("row_tokens", "longest", "named"),
    [(100, 101, "max_sequence_length \\(101\\).*row_tokens \\(100\\)"), (100, 2, "max_sequence_length is 2")],
)
def test_lengths_that_cannot_fit_are_refused_by_name(row_tokens: int, longest: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        plan_epoch(np.array([5]), row_tokens, longest, 2, seed=0, epoch=0)


@given(
    lengths=st.lists(st.integers(1, 90), max_size=600),
    row_tokens=st.sampled_from([90, 100, 4200]),
    boundary=st.integers(1, 2),
)
def test_a_sequence_goes_to_the_row_with_the_least_room_that_takes_it(
    lengths: list[int], row_tokens: int, boundary: int
) -> None:
    order = np.arange(len(lengths), dtype=np.int32)
    row_of, num_rows = _best_fit(order, np.array(lengths, dtype=np.int32), row_tokens, 80, boundary)
    rooms: list[int] = []
    for start in range(0, len(lengths), 256):  # longest first within a window, else in order
        window = sorted(
            range(start, min(start + 256, len(lengths))), key=lambda at: (-min(lengths[at], 80 - boundary), at)
        )
        assert order[start : start + 256].tolist() == window
    for number, row in zip(order.tolist(), row_of.tolist(), strict=True):
        needed = min(lengths[number] + boundary, 80)
        least = min((room for room in rooms if room >= needed), default=None)
        if least is None:
            assert row == len(rooms)
            rooms.append(row_tokens)
        assert rooms[row] == (row_tokens if least is None else least)
        rooms[row] -= needed
    assert num_rows == len(rooms)


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
def test_a_shuffle_is_durstenfelds_with_the_keys_stream(seed: int, num_items: int) -> None:
    items = np.arange(num_items, dtype=np.int32)
    _shuffle(items, np.uint64(seed))
    expected = list(range(num_items))
    for last in range(num_items - 1, 0, -1):
        state = (seed + (last + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        other = (state ^ (state >> 31)) * (last + 1) >> 64
        expected[last], expected[other] = expected[other], expected[last]
    assert items.tolist() == expected


def test_every_item_comes_to_every_place_equally_often() -> None:
    counts = np.zeros((6, 6))
    for seed in range(12_000):
        items = np.arange(6, dtype=np.int32)
        _shuffle(items, key(seed))
        counts[np.arange(6), items] += 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 80  # chi-square, 25 degrees of freedom


def test_numbers_take_four_bytes_each() -> None:
    plan = plan_epoch(protein_lengths(158, 1000).astype(np.int32), 1024, 1024, 2, 0, 0)
    assert plan.sequence_ids.dtype == np.int32
    assert plan.row(0).dtype == np.int64
