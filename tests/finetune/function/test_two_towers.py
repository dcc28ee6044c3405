"""What stands between towers and fusion: pooling that sees no padding, standardisation, one pass for many pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megaprot.finetune.function.two_towers import Standardize, TowersHead
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.protein_states import gather_proteins, whole_states
from tests.finetune.folders import alone, esm_folder, random_proteins, residue_ids


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_pooling_gives_a_protein_what_it_has_alone(tmp_path: Path, pooling: str) -> None:
    encoder = load_encoder(esm_folder(tmp_path / "model"))
    head = TowersHead("dot", pooling, "none", 32, 24, 8, 16, 0.0)
    if pooling == "attention":
        torch.nn.init.normal_(head.pooling.score.weight)  # type: ignore[union-attr, arg-type]
    proteins = random_proteins([25, 7, 40, 7])
    ids = residue_ids(encoder, proteins)
    with torch.no_grad():
        together = gather_proteins(encoder.vocabulary, 0, ids)
        pooled = head.pool(together.whole, whole_states(encoder, together))
        for protein, vector in zip(proteins, pooled, strict=True):
            states = alone(tmp_path / "model", protein.decode(), output_hidden_states=True).hidden_states[-1][0, 1:-1]
            weights = torch.full((len(states),), 1 / len(states))
            if pooling == "attention":
                weights = torch.softmax(states @ head.pooling.score.weight[0], dim=0)  # type: ignore[union-attr, index]
            torch.testing.assert_close(vector, weights @ states, atol=1e-5, rtol=1e-4)


def test_the_first_steps_statistics_are_those_of_all_they_saw() -> None:
    layer = Standardize(3)
    steps = [torch.randn(50, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 9.0, -2.0]) for _ in range(20)]
    for step in steps:
        layer(step)
    layer.eval()
    seen = torch.cat(steps)
    standardised = layer(seen)
    torch.testing.assert_close(standardised.mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(standardised.std(dim=0), torch.ones(3), atol=1e-2, rtol=0)


def test_scoring_changes_no_statistics_and_one_vector_is_enough() -> None:
    layer = Standardize(3)
    assert torch.isfinite(layer(torch.ones(1, 3))).all()
    before = layer.mean.clone()
    layer.eval()(torch.randn(5, 3))
    assert torch.equal(layer.mean, before)
    assert np.isfinite(layer(torch.full((2, 3), 7.0)).numpy()).all()


def test_a_block_of_projected_vectors_scores_as_its_pairs() -> None:
    for fusion in ("dot", "bilinear", "concat"):
        torch.manual_seed(1)
        head = TowersHead(fusion, "mean", "none", 12, 10, 8, 16, 0.1).double().eval()
        proteins, texts = torch.randn(4, 12, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
        left, right = head.project_proteins(proteins), head.text(texts)
        block = head.fusion(left, right)
        for row in range(4):
            for column in range(5):
                own = head.fusion(head.protein(proteins[row : row + 1]), head.text(texts[column : column + 1]))
                assert abs((own - block[row, column]).item()) < 1e-6
