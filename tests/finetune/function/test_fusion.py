"""Blocks of scores against one pair at a time, and against the formula written out."""

import pytest
import torch
from torch.nn import functional

from megaprot.finetune.function import fusion
from megaprot.finetune.function.fusion import FUSIONS, build_fusion


def vectors(num_proteins: int = 7, num_terms: int = 5, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_proteins, size, generator=generator, dtype=torch.float64),
        torch.randn(num_terms, size, generator=generator, dtype=torch.float64),
    )


def built(name: str, size: int = 6) -> torch.nn.Module:
    torch.manual_seed(2)
    return build_fusion(name, size, 8, 0.0).double()


@pytest.mark.parametrize("name", FUSIONS)
def test_a_block_scores_as_its_pairs_do_one_by_one(name: str) -> None:
    proteins, terms = vectors()
    scores = built(name)
    block = scores(proteins, terms)
    for row in range(len(proteins)):
        for column in range(len(terms)):
            pair = scores(proteins[row : row + 1], terms[column : column + 1])
            assert pair.shape == (1, 1)
            assert abs((pair - block[row, column]).item()) < 1e-6


def test_concat_is_the_perceptron_over_both_vectors_and_their_difference() -> None:
    proteins, terms = vectors()
    scores = built("concat")
    for row, protein in enumerate(proteins):
        for column, term in enumerate(terms):
            joined = torch.cat([protein, term, (protein - term).abs()])
            hidden = functional.relu(scores.first(joined))
            torch.testing.assert_close(scores(proteins, terms)[row, column], scores.last(hidden)[0])


def test_dot_is_a_scaled_cosine_and_the_terms_bias() -> None:
    proteins, terms = vectors()
    scores = built("dot")
    cosine = functional.cosine_similarity(proteins[3], terms[2], dim=0)
    expected = cosine * scores.log_scale.exp()[0] + scores.bias(terms[2])[0]
    torch.testing.assert_close(scores(proteins, terms)[3, 2], expected)


def test_bilinear_is_a_quadratic_form_and_the_terms_bias() -> None:
    proteins, terms = vectors()
    scores = built("bilinear")
    expected = proteins[3] @ scores.weight.weight @ terms[2] / 6**0.5 + scores.bias(terms[2])[0]
    torch.testing.assert_close(scores(proteins, terms)[3, 2], expected)


def test_chunks_of_rows_change_neither_scores_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for room in (1 << 24, 5 * 8 * 2):  # all rows at once, two rows at a time
        monkeypatch.setattr(fusion, "_BLOCK_VALUES", room)
        proteins, terms = (one.requires_grad_() for one in vectors())
        scores = built("concat")
        logits = scores(proteins, terms)
        logits.square().sum().backward()
        found.append([logits, proteins.grad, terms.grad, *(part.grad for part in scores.parameters())])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked)
