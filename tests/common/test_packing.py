"""Rows against naive loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.packing import PackedRow, lay_out_row, to_tensors
from megaprot.common.vocabulary import Vocabulary, get_vocabulary

VOCABULARIES = ("esm", "iupac", "proteinlm")


def naive_row(pieces: list[list[int]], row_tokens: int, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Build a row token by token."""
    tokens: list[int] = []
    positions: list[int] = []
    bounds = [0]
    for piece in pieces:
        inner = [vocabulary.begin, *piece] + ([vocabulary.end] if vocabulary.end >= 0 else [])
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
    }


@given(
    name=st.sampled_from(VOCABULARIES),
    pieces=st.lists(st.lists(st.integers(5, 24), min_size=1, max_size=30), max_size=8),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    gap=st.integers(0, 9),
    padding=st.integers(0, 5),
)
def test_a_row_is_what_a_loop_over_tokens_makes(
    name: str, pieces: list[list[int]], dtype: type[np.integer], gap: int, padding: int
) -> None:
    vocabulary = get_vocabulary(name)
    flat, starts = [], []
    for piece in pieces:  # residues of the corpus that are not in the row lie between the pieces
        flat += [25] * gap
        starts.append(len(flat))
        flat += piece
    row_tokens = max(1, sum(len(piece) + vocabulary.num_boundary_tokens for piece in pieces) + padding)
    row = lay_out_row(
        np.array(flat, dtype=dtype),
        np.array(starts, dtype=np.int64),
        np.array([len(piece) for piece in pieces], dtype=np.int64),
        row_tokens,
        vocabulary,
    )
    for field, expected in naive_row(pieces, row_tokens, vocabulary).items():
        assert getattr(row, field).tolist() == expected, field
    assert row.num_sequences == len(pieces)
    assert row.cu_seqlens.dtype == np.int32
    assert row.tokens.dtype == row.positions.dtype == np.int64


def test_tensors_hold_what_the_row_holds() -> None:
    row = PackedRow(
        tokens=np.arange(8),
        positions=np.array([0, 1, 2, 0, 1, 0, 0, 0]),
        cu_seqlens=np.array([0, 3, 5, 8], dtype=np.int32),
        num_sequences=2,
        masked_positions=np.array([1, 4, 7]),
        labels=np.array([4, 5, 1]),
        masked_kind=np.array([2, 1, 0], dtype=np.uint8),
        num_residues=2,
    )
    batch = to_tensors(row, torch.device("cpu"))
    for field in ("tokens", "positions", "cu_seqlens", "masked_positions", "labels", "masked_kind"):
        tensor = getattr(batch, field)
        assert tensor.tolist() == getattr(row, field).tolist()
        assert tensor.numpy().dtype == getattr(row, field).dtype
    assert batch.segment_lengths == (3, 2, 3)
    assert batch.masked_cu_seqlens.tolist() == [0, 1, 2, 3]
    assert batch.masked_cu_seqlens.dtype == torch.int32
    assert batch.masked_lengths == (1, 1, 1)


def test_more_than_a_row_holds_is_refused() -> None:
    lengths = np.array([3, 4])
    with pytest.raises(ValueError, match="11 tokens do not fit a row of 10"):
        lay_out_row(np.zeros(7, dtype=np.uint8), np.array([0, 3]), lengths, 10, get_vocabulary("esm"))


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
