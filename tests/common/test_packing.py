"""Plans and rows against naive loops."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.packing import PackedRow, PackingPlan, lay_out_row, plan_epoch, to_tensors
from megaprot.common.vocabulary import Vocabulary, get_vocabulary

VOCABULARIES = ("esm", "iupac", "proteinlm")


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
    assert time.process_time() - start < 2  # about 0.05 s


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


def naive_row(pieces: list[list[int]], row_tokens: int, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Build a row token by token."""
    tokens: list[int] = []
    positions: list[int] = []
    bounds = [0]
    places: list[int] = []
    counters: list[int] = []
    for piece in pieces:
        inner = [vocabulary.begin, *piece] + ([vocabulary.end] if vocabulary.end >= 0 else [])
        places += [len(tokens) + 1 + count for count in range(len(piece))]
        counters += range(len(piece))
        positions += range(len(inner))
        tokens += inner
        bounds.append(len(tokens))
    if len(tokens) < row_tokens:
        bounds.append(row_tokens)
    padding = row_tokens - len(tokens)
    return {
        "tokens": tokens + [vocabulary.pad] * padding,
        "positions": positions + [0] * padding,
        "cu_seqlens": bounds,
        "residue_positions": places,
        "residue_counters": counters,
    }


@given(
    name=st.sampled_from(VOCABULARIES),
    pieces=st.lists(st.lists(st.integers(5, 24), min_size=1, max_size=30), max_size=8),
    gap=st.integers(0, 9),
    padding=st.integers(0, 5),
)
def test_a_row_is_what_a_loop_over_tokens_makes(name: str, pieces: list[list[int]], gap: int, padding: int) -> None:
    vocabulary = get_vocabulary(name)
    flat, starts = [], []
    for piece in pieces:  # residues of the corpus that are not in the row lie between the pieces
        flat += [25] * gap
        starts.append(len(flat))
        flat += piece
    row_tokens = max(1, sum(len(piece) + vocabulary.num_boundary_tokens for piece in pieces) + padding)
    row = lay_out_row(
        np.array(flat, dtype=np.uint8),
        np.array(starts, dtype=np.int64),
        np.array([len(piece) for piece in pieces], dtype=np.int64),
        row_tokens,
        vocabulary,
    )
    for field, expected in naive_row(pieces, row_tokens, vocabulary).items():
        assert getattr(row, field).tolist() == expected, field
    assert row.cu_seqlens.dtype == np.int32
    assert row.tokens.dtype == row.positions.dtype == np.int64


def test_tensors_hold_what_the_row_holds() -> None:
    row = PackedRow(
        tokens=np.arange(8),
        positions=np.array([0, 1, 2, 0, 1, 0, 0, 0]),
        cu_seqlens=np.array([0, 3, 5, 8], dtype=np.int32),
        num_sequences=2,
        masked_positions=np.array([1, 0]),
        labels=np.array([4, 1]),
        masked_kind=np.array([2, 0], dtype=np.uint8),
        num_residues=1,
    )
    batch = to_tensors(row, torch.device("cpu"))
    for field in ("tokens", "positions", "cu_seqlens", "masked_positions", "labels", "masked_kind"):
        tensor = getattr(batch, field)
        assert tensor.tolist() == getattr(row, field).tolist()
        assert tensor.numpy().dtype == getattr(row, field).dtype
    assert (batch.num_sequences, batch.num_residues) == (2, 1)
    assert batch.segment_lengths == [3, 2, 3]
    assert batch.max_segment_length == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_reach_a_gpu_unchanged() -> None:
    values = np.arange(2048)
    bounds = np.array([0, 2048], dtype=np.int32)
    row = PackedRow(values, values + 1, bounds, 1, values[:64], values[64:128], np.ones(64, dtype=np.uint8), 2046)
    batch = to_tensors(row, torch.device("cuda"))
    assert batch.tokens.device.type == "cuda"
    assert np.array_equal(batch.tokens.cpu().numpy(), values)
    assert np.array_equal(batch.positions.cpu().numpy(), values + 1)
