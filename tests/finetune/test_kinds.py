"""Losses of the tasks against TAPE's own, and outcomes and tables by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from megaprot.finetune.config import HeadConfig, LabelConfig
from megaprot.finetune.examples import Example
from megaprot.finetune.task import Task
from megaprot.finetune.tasks import open_task


def example(number: int, label: Any, length: int = 4) -> Example:
    residues = np.full(length, 5, dtype=np.uint8)
    return Example(number, number, f"p{number}", residues, "A" * length, np.asarray(label))


def mean_loss(task: Task, outputs: Any, examples: list[Example]) -> float:
    return task.loss(outputs, examples).item() / sum(map(task.weight, examples))


@pytest.mark.parametrize("name", ["fluorescence", "stability"])
def test_regression_losses_equal_tapes(name: str) -> None:
    modeling = pytest.importorskip("tape.models.modeling_utils")
    head, pooled = modeling.ValuePredictionHead(16), torch.randn(5, 16)
    labels = torch.randn(5, 1)
    expected, outputs = head(pooled, labels)
    task, examples = open_task(name, LabelConfig()), [example(i, labels[i].numpy()) for i in range(5)]
    task.learn(examples, HeadConfig(name="tape"))
    assert mean_loss(task, outputs, examples) == pytest.approx(float(expected), rel=1e-5)


def test_classification_loss_equals_tapes() -> None:
    modeling = pytest.importorskip("tape.models.modeling_utils")
    head, labels = modeling.SequenceClassificationHead(16, 1195), torch.randint(0, 1195, (5,))
    (expected, metrics), outputs = head(torch.randn(5, 16), labels)
    task, examples = open_task("remote_homology", LabelConfig()), [example(i, [int(labels[i])]) for i in range(5)]
    task.learn(examples, HeadConfig(name="tape"))
    assert mean_loss(task, outputs, examples) == pytest.approx(float(expected), rel=1e-5)
    found = task.metrics(examples, task.outcomes(outputs.detach(), examples))["top1_accuracy"](np.ones(5))
    assert found == pytest.approx(float(metrics["accuracy"]))


@pytest.mark.parametrize("num_classes", [3, 8])
def test_secondary_structure_loss_and_accuracy_equal_tapes(num_classes: int) -> None:
    modeling = pytest.importorskip("tape.models.modeling_utils")
    head = modeling.SequenceToSequenceClassificationHead(16, num_classes, ignore_index=-1)
    labels = torch.randint(-1, num_classes, (3, 11))
    (expected, metrics), outputs = head(torch.randn(3, 11, 16), labels)
    task = open_task("secondary_structure", LabelConfig(num_classes=num_classes))
    ones = np.ones(11, dtype=int)
    examples = [example(i, np.stack((labels[i].numpy(), ones)), 11) for i in range(3)]
    outputs = outputs.flatten(0, 1)
    assert mean_loss(task, outputs, examples) == pytest.approx(float(expected), rel=1e-5)
    found = {
        name: one(np.ones(3)) for name, one in task.metrics(examples, task.outcomes(outputs.detach(), examples)).items()
    }
    assert found["tape_accuracy"] == found["accuracy"] == pytest.approx(float(metrics["accuracy"]))


def test_residues_that_are_not_valid_count_for_tape_alone() -> None:
    task = open_task("secondary_structure", LabelConfig())
    examples = [example(0, [[0, 1, 2, 2], [1, 0, 1, 0]]), example(1, [[-1, 0, 0, 0], [1, 1, 0, 0]])]
    outputs = functional.one_hot(torch.tensor([0, 1, 0, 0, 2, 0, 1, 1]), 3).float()
    assert [task.weight(one) for one in examples] == [2, 1]
    found = task.metrics(examples, task.outcomes(outputs, examples))
    assert found["accuracy"](np.ones(2)) == pytest.approx(2 / 3)
    assert found["accuracy_per_protein"](np.ones(2)) == pytest.approx((1 / 2 + 1) / 2)
    assert found["tape_accuracy"](np.ones(2)) == pytest.approx(3 / 7)
    rows = map(task.rows, examples, task.outcomes(outputs, examples))
    assert [list(one) for one in rows] == [[("AAAA", "HEHH")], [("AAAA", "CHEE")]]  # fmt: skip


def test_regression_labels_are_standardised_for_our_heads_and_predictions_are_not() -> None:
    task = open_task("stability", LabelConfig())
    examples = [example(i, [label]) for i, label in enumerate((1.0, 3.0, 5.0))]
    task.learn(examples, HeadConfig())
    spread = np.std([1.0, 3.0, 5.0])
    assert task.state() == {"mean": 3.0, "spread": pytest.approx(spread)}
    outputs = torch.tensor([[-1.0], [0.0], [2.0]])
    errors = [(1 - 3) / spread + 1, 0.0, (5 - 3) / spread - 2]
    assert mean_loss(task, outputs, examples) == pytest.approx(np.mean(np.square(errors)), rel=1e-5)
    values = [outcome["value"][0] for outcome in task.outcomes(outputs, examples)]
    assert values == pytest.approx([3 - spread, 3.0, 3 + 2 * spread])
    other = open_task("stability", LabelConfig())
    other.restore(task.state())
    assert other.state() == task.state()
    found = task.metrics(examples, task.outcomes(outputs, examples))
    assert found["mae"](np.ones(3)) == pytest.approx(np.mean([abs(spread - 2), 0, abs(2 * spread - 2)]))


def test_five_most_probable_classes_and_fewer() -> None:
    task = open_task("sequence_classification", LabelConfig())
    examples = [example(i, [name]) for i, name in enumerate("abc")]
    task.learn(examples, HeadConfig())
    outputs = torch.tensor([[3.0, 1, 0], [3.0, 1, 0], [1.0, 3, 0]])
    outcomes = task.outcomes(outputs, examples)
    assert [next(iter(task.rows(one, outcome)))[0] for one, outcome in zip(examples, outcomes, strict=True)] == [
        "a",
        "a",
        "b",
    ]
    chances = outputs.softmax(dim=1)
    assert list(task.rows(examples[0], outcomes[0])) == [("a", f"{float(chances[0, 0]):.4f}", "a b c")]
    found = task.metrics(examples, outcomes)
    assert found["top1_accuracy"](np.ones(3)) == pytest.approx(1 / 3)
    assert found["top5_accuracy"](np.ones(3)) == 1.0


def test_contact_weights_count_both_triangles() -> None:
    task = open_task("contact_prediction", LabelConfig())
    positions = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    positions[3] = np.nan
    one = example(0, positions, 12)
    labels = task._map(one)  # type: ignore[attr-defined]
    assert task.weight(one) == (labels >= 0).sum()
    logits = torch.randn(12, 12)
    expected = functional.cross_entropy(
        torch.stack((torch.zeros(12, 12), logits), dim=2).flatten(0, 1),
        torch.from_numpy(labels).flatten(),
        ignore_index=-1,
    )
    assert mean_loss(task, logits.flatten(), [one]) == pytest.approx(float(expected), rel=1e-5)
    outcome = task.outcomes(((logits + logits.t()) / 2).flatten(), [one])[0]
    rows = list(task.rows(one, outcome))
    assert len(rows) == 12
    assert all(int(j) - int(i) >= 6 for i, j, _ in rows)
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
