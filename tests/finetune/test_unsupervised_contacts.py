"""Contacts from attention alone: features as ESM's contact head has them, the fit as scikit-learn's, windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from megaprot.finetune.examples import Example
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.unsupervised_contacts import attention_features, fit_sparse, unsupervised_precision
from tests.finetune.folders import alone, bert_folder, esm_folder, random_proteins, residue_ids


def test_features_are_those_of_esms_contact_head(tmp_path: Path) -> None:
    from esm.modules import apc, symmetrize

    folder = esm_folder(tmp_path / "model", token_dropout=False)
    encoder, (protein,) = load_encoder(folder), random_proteins([19])
    attentions = torch.cat(alone(folder, protein.decode(), output_attentions=True).attentions, dim=1)[0]
    expected = apc(symmetrize(attentions[:, 1:-1, 1:-1])).permute(1, 2, 0)
    found = attention_features(encoder, residue_ids(encoder, [protein])[0])
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_fit_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(0, 0.05, (3000, 12))
    truth = 40 * inputs[:, 0] - 25 * inputs[:, 5] - 2 + random.logistic(size=3000)
    labels = (truth > 0).astype(int)
    theirs = LogisticRegression(penalty="l1", C=0.15, solver="saga", max_iter=20_000, tol=1e-8).fit(inputs, labels)
    weights, bias = fit_sparse(torch.from_numpy(inputs).float(), torch.from_numpy(labels))
    assert weights.numpy() == pytest.approx(theirs.coef_[0], abs=0.02)
    assert float(bias) == pytest.approx(float(theirs.intercept_[0]), abs=0.01)
    assert set(np.flatnonzero(weights.numpy())) <= {0, 5, *np.flatnonzero(theirs.coef_[0])}


def test_contacts_that_attention_shows_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    examples = []
    for number in range(6):
        positions = random.normal(0, 1.6, (60, 3)).cumsum(axis=0).astype(np.float32)
        examples.append(Example(number, number, "", np.full(60, number, dtype=np.uint8), "", positions))

    def shown(encoder: object, residues: np.ndarray) -> torch.Tensor:
        positions = examples[residues[0]].label
        apart = np.linalg.norm(positions[:, None] - positions[None], axis=2)
        noise = random.normal(0, 0.02, (60, 60, 5))
        noise[:, :, 3] += np.exp(-apart / 8)
        return torch.from_numpy(noise).float()

    monkeypatch.setattr("megaprot.finetune.unsupervised_contacts.attention_features", shown)
    found = unsupervised_precision(None, examples[:3], examples[3:], 50)  # type: ignore[arg-type]
    metric = found["precision_at_l5_min_sep_6"]
    assert metric.value > 0.9
    assert metric.low <= metric.value <= metric.high


def test_long_proteins_are_read_in_windows(tmp_path: Path) -> None:
    encoder = load_encoder(bert_folder(tmp_path / "model"))  # 62 residues at most
    (long,) = residue_ids(encoder, random_proteins((100,)))
    whole, first = attention_features(encoder, long), attention_features(encoder, long[:62])
    assert whole.shape == (100, 100, 12)
    assert torch.allclose(whole[:38, :38], first[:38, :38], atol=1e-6)
    second = attention_features(encoder, long[38:])
    assert torch.allclose(whole[38:62, 38:62], (first[38:, 38:] + second[:24, :24]) / 2, atol=1e-6)
    assert not whole[0, 99].any()
