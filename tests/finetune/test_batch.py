"""Rows of sequences against a loop over their tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.vocabulary import VOCABULARIES, Vocabulary
from megaprot.finetune.batch import Batch, pack

PROTEINS = st.lists(st.lists(st.integers(4, 23), min_size=1, max_size=6), min_size=1, max_size=8)


def row_of(vocabulary: Vocabulary, proteins: list[list[int]]) -> Batch:
    return pack(vocabulary, [np.array(protein, dtype=np.uint8) for protein in proteins])


@pytest.mark.parametrize("name", VOCABULARIES)
@given(proteins=PROTEINS)
def test_a_row_is_what_a_loop_over_its_tokens_says(name: str, proteins: list[list[int]]) -> None:
    vocabulary = VOCABULARIES[name]
    batch = row_of(vocabulary, proteins)
    tokens, positions, sequence, is_residue, bounds = [], [], [], [], [0]
    for number, protein in enumerate(proteins):
        ids = [vocabulary.begin, *protein] + ([vocabulary.end] if vocabulary.end >= 0 else [])
        for place, token in enumerate(ids):
            tokens.append(token)
            positions.append(place)
            sequence.append(number)
            is_residue.append(1 <= place <= len(protein))
        bounds.append(len(tokens))
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.sequence.tolist() == sequence
    assert batch.is_residue.tolist() == is_residue
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.num_sequences == len(proteins)
    places = [first + number for first, count, _ in batch.runs for number in range(count)]
    lengths = [length for _, count, length in batch.runs for _ in range(count)]
    assert places == list(range(len(proteins)))
    assert tuple(lengths) == batch.lengths == tuple(np.diff(bounds).tolist())
    assert all(one[2] != other[2] for one, other in zip(batch.runs, batch.runs[1:], strict=False)), "runs not joined"


@given(proteins=PROTEINS)
def test_residues_means_and_first_tokens_leave_boundaries_out(proteins: list[list[int]]) -> None:
    batch = row_of(VOCABULARIES["esm"], proteins)
    states = torch.randn(len(batch.tokens), 3)
    found = batch.residues(states)
    for number, protein in enumerate(proteins):
        start = int(batch.cu_seqlens[number])
        expected = states[start + 1 : start + 1 + len(protein)]
        assert torch.equal(found[number], expected)
        torch.testing.assert_close(batch.mean(states)[number], expected.mean(dim=0))
        assert torch.equal(batch.first(states)[number], states[start])


def test_means_of_half_precision_are_summed_in_single_precision() -> None:
    batch = row_of(VOCABULARIES["esm"], [[4] * 3000])
    states = torch.full((3002, 1), 100.0, dtype=torch.float16)  # the sum is beyond fp16
    assert batch.mean(states).tolist() == [[100.0]]
    assert batch.mean(states).dtype == torch.float32


def test_a_batch_moves_as_a_whole() -> None:
    moved = row_of(VOCABULARIES["esm"], [[4, 5], [6]]).to(torch.device("meta"))
    tensors = [moved.tokens, moved.positions, moved.sequence, moved.is_residue, moved.cu_seqlens]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.lengths == (4, 3)
