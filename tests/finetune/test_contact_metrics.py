"""Contact precision against naive loops, and each published variant against its authors' formula."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from megaprot.finetune.contact_metrics import contact_labels, count_hits, definitions, precision_metrics


def chain(length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A compact random walk, which residues are resolved, and predicted probabilities that know something."""
    random = np.random.default_rng(seed)
    positions = random.normal(0, 1.5, (length, 3)).cumsum(axis=0) * 0.9
    is_valid = random.random(length) > 0.1
    labels = contact_labels(positions.astype(np.float32), is_valid)
    logits = random.normal(0, 1, (length, length)) + 2.0 * (labels == 1)
    logits = (logits + logits.T) / 2
    return positions, is_valid, 1 / (1 + np.exp(-logits))


def naive_hits(
    probabilities: np.ndarray, labels: np.ndarray, least: int, end: int, num_picked: int
) -> tuple[float, float]:
    pairs = [
        (probabilities[i, j], labels[i, j])
        for i, j in itertools.combinations(range(len(labels)), 2)
        if labels[i, j] >= 0 and j - i >= least and (not end or j - i < end)
    ]
    picked = sorted(pairs, reverse=True)[:num_picked]
    return float(sum(label for _, label in picked)), float(len(picked))


def test_labels_by_hand() -> None:
    positions = np.zeros((9, 3), dtype=np.float32)
    positions[:, 0] = np.arange(9) * 1.3  # residues 6 apart are 7.8 Angstrom apart, 7 apart 9.1
    is_valid = np.ones(9, dtype=bool)
    is_valid[1] = False
    labels = contact_labels(positions, is_valid)
    assert (labels == labels.T).all()
    assert labels[0, 6] == labels[2, 8] == 1
    assert labels[0, 7] == labels[0, 8] == 0
    assert labels[0, 5] == labels[0, 0] == -1  # too near along the chain
    assert labels[1, 7] == labels[1, 8] == -1  # not resolved
    positions[6, 0] = 8.0
    assert contact_labels(positions, is_valid)[0, 6] == 0  # 8 Angstrom is no contact


@pytest.mark.parametrize("seed", range(3))
def test_every_definition_is_a_naive_loop(seed: int) -> None:
    positions, is_valid, probabilities = chain(57, seed)
    labels = contact_labels(positions, is_valid)
    counts = count_hits(probabilities, labels)
    assert counts["precision_at_l_min_sep_6"][0] > 0
    ranges = {"min_sep_6": (6, 0), "sep_6_11": (6, 12), "sep_12_23": (12, 24), "min_sep_12": (12, 0),
              "min_sep_24": (24, 0)}  # fmt: skip
    for name, (least, end) in ranges.items():
        for share_name, num_picked in (("l", 57), ("l2", 28), ("l5", 11)):
            expected = naive_hits(probabilities, labels, least, end, num_picked)
            assert tuple(counts[f"precision_at_{share_name}_{name}"]) == expected


@pytest.mark.parametrize("seed", range(3))
def test_tapes_variant_is_tapes_own_code(seed: int) -> None:
    modeling = pytest.importorskip("tape.models.modeling_utils")
    random = np.random.default_rng(seed)
    total = np.zeros(2)
    for length in (40, 64):
        positions, is_valid, _ = chain(length, seed)
        labels = contact_labels(positions, is_valid)
        logits = torch.from_numpy(random.normal(0, 2, (1, length, length, 2)))
        logits = (logits + logits.transpose(1, 2)) / 2
        head = modeling.PairwiseContactPredictionHead(4, ignore_index=-1)
        expected = head.compute_precision_at_l5(torch.tensor([length]), logits, torch.from_numpy(labels)[None])
        chances = functional.softmax(logits, dim=3)[0, :, :, 1].numpy()
        hits, picks = count_hits(chances, labels)["tape_precision_at_l5"]
        assert hits / picks == pytest.approx(float(expected))
        total += (hits, picks)


def test_proteinlms_variant_takes_each_pair_twice() -> None:
    positions, is_valid, probabilities = chain(50, 0)
    labels = contact_labels(positions, is_valid)
    masked = np.where(labels >= 0, probabilities, -1)
    picked = np.argsort(-masked, axis=None, kind="stable")[:10]  # over the whole symmetric matrix
    hits, picks = count_hits(probabilities, labels)["proteinlm_precision_at_l5"]
    assert (hits, picks) == (labels.ravel()[picked].sum(), 10)


def test_macro_and_micro_averages_and_proteins_without_pairs() -> None:
    counts = {name: np.array([[1.0, 2.0], [9.0, 10.0], [0.0, 0.0]]) for name in ("precision_at_l5_min_sep_24",)}
    metrics = precision_metrics(counts)
    assert metrics["precision_at_l5_min_sep_24"](np.ones(3)) == pytest.approx(0.7)
    assert metrics["precision_at_l5_min_sep_24_micro"](np.ones(3)) == pytest.approx(10 / 12)


@pytest.mark.parametrize("length", [1, 4, 6, 7, 11])
def test_short_chains_have_few_picks_or_none(length: int) -> None:
    positions, is_valid, probabilities = chain(length, 0)
    counts = count_hits(probabilities, contact_labels(positions, is_valid))
    assert {one.shape for one in counts.values()} == {(2,)}
    assert counts["precision_at_l5_min_sep_24"].tolist() == [0, 0]


def test_each_metric_has_its_definition() -> None:
    positions, is_valid, probabilities = chain(30, 0)
    counts = count_hits(probabilities, contact_labels(positions, is_valid))
    metrics = precision_metrics({name: one[None] for name, one in counts.items()})
    assert set(metrics) == set(definitions())
