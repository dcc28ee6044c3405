"""Losses over blocks against loops over their cells."""

import math

import torch

from megaprot.finetune.function.losses import bce, contrastive


def block(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(5, 6, generator=generator) < 0.4
    is_known = (torch.rand(5, 6, generator=generator) < 0.8) | labels
    return torch.randn(5, 6, generator=generator), labels, is_known


def test_cross_entropy_is_the_mean_over_what_is_known_of_each_protein() -> None:
    logits, labels, is_known = block()
    for row, loss in enumerate(bce(logits, labels, is_known).tolist()):
        each = [
            math.log1p(math.exp(-value if label else value))
            for value, label, known in zip(logits[row].tolist(), labels[row], is_known[row], strict=True)
            if known
        ]
        assert abs(loss - sum(each) / len(each)) < 1e-6


def test_a_protein_of_which_nothing_is_known_has_no_loss() -> None:
    logits, labels, _ = block()
    assert bce(logits, labels & False, labels & False).tolist() == [0.0] * 5


def against(value: float, negatives: list[float]) -> float:
    return -math.log(math.exp(value) / (math.exp(value) + sum(map(math.exp, negatives))))


def test_contrast_is_of_each_positive_with_the_negatives_of_its_row_and_of_its_column() -> None:
    logits, labels, is_known = block(1)
    total = 0.0
    for row in range(5):
        negatives = [float(logits[row, place]) for place in range(6) if is_known[row, place] and not labels[row, place]]
        positives = [float(logits[row, place]) for place in range(6) if labels[row, place]]
        total += sum(against(value, negatives) for value in positives) / max(len(positives), 1) / 2
    columns = [column for column in range(6) if labels[:, column].any()]
    for column in columns:
        of_column = range(5)
        is_negative = is_known[:, column] & ~labels[:, column]
        negatives = [float(logits[row, column]) for row in of_column if is_negative[row]]
        positives = [float(logits[row, column]) for row in of_column if labels[row, column]]
        total += sum(against(value, negatives) for value in positives) / len(positives) / len(columns) * 5 / 2
    assert abs(float(contrastive(logits, labels, is_known).sum()) - total) < 1e-4


def test_contrast_has_finite_gradients_where_nothing_is_negative() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    labels = torch.ones(2, 3, dtype=torch.bool)
    contrastive(logits, labels, labels).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
