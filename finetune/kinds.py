"""The kinds of labels that tasks are made of: a number a protein, a class a protein, a class a residue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from megaprot.common.errors import InputError
from megaprot.finetune import figures
from megaprot.finetune.config import HeadConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.examples import BadLabel, Example
from megaprot.finetune.heads import protein_head, residue_head
from megaprot.finetune.metrics import Weighted, f1, macro_f1, mean_of, mean_ratio, pearson, ratio, spearman
from megaprot.finetune.task import Outcome, Task, concatenated

NO_LABEL = -1
PROTEIN_HEADS = ("mean", "attention", "tape")
RESIDUE_HEADS = ("convolution", "mlp", "tape")


class Regression(Task):
    """A number a protein, by mean squared error on standardised labels; ``tape`` takes them as they are.

    Attributes:
        key: Name of the label in a record; empty takes the table's target column.
    """

    key: ClassVar[str] = ""
    heads = PROTEIN_HEADS
    metric = "spearman"
    mean, spread = 0.0, 1.0

    def label_of(self, record: dict[str, Any], num_residues: int) -> NDArray[Any]:
        """Return the number, float64 [1]."""
        value = _found(record, self.key or self.labels.target)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise BadLabel(f"the label '{value}' is no number") from None
        number = np.asarray(value, dtype=np.float64).reshape(-1) if _is_numbers(value) else np.empty(0)
        if len(number) != 1:
            raise BadLabel(f"the label {str(value)[:40]} is not one number")
        if not np.isfinite(number[0]):
            raise BadLabel(f"the label is {number[0]}, not a finite number")
        return number

    def learn(self, examples: Sequence[Example], config: HeadConfig) -> None:
        """Take mean and spread of the labels."""
        labels = np.concatenate([example.label for example in examples])
        if self.head_name(config) == "tape":
            return
        self.mean, self.spread = float(labels.mean()), float(labels.std()) or 1.0

    def state(self) -> dict[str, Any]:
        """Return mean and spread of the training labels."""
        return {"mean": self.mean, "spread": self.spread}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        self.mean, self.spread = float(state["mean"]), float(state["spread"])

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return a head with one output."""
        return protein_head(self.head_name(config), encoder.hidden_size, config.hidden_size, 1, config.dropout)

    def loss(self, outputs: Any, examples: Sequence[Example]) -> Tensor:
        """Return the sum of squared errors."""
        labels = (concatenated((example.label for example in examples), outputs) - self.mean) / self.spread
        return functional.mse_loss(outputs.float().squeeze(1), labels.float(), reduction="sum")

    def outcomes(self, outputs: Any, examples: Sequence[Example]) -> list[Outcome]:
        """Return the predicted number of each protein."""
        values = outputs.float().squeeze(1).cpu().numpy().astype(np.float64) * self.spread + self.mean
        return [{"value": values[place : place + 1]} for place in range(len(examples))]

    def metrics(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return rank and linear correlation and mean errors."""
        labels, values = _labels_and(examples, outcomes, "value")
        ones = np.ones(len(labels))
        return {
            "spearman": spearman(labels, values),
            "pearson": pearson(labels, values),
            "mse": ratio((labels - values) ** 2, ones),
            "mae": ratio(np.abs(labels - values), ones),
        }

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return {
            "spearman": "Spearman's rank correlation over all proteins, ties with their mean rank.",
            "pearson": "Pearson's correlation over all proteins.",
            "mse": "Mean squared error, in the labels' unit squared.",
            "mae": "Mean absolute error, in the labels' unit.",
        }

    def columns(self) -> tuple[str, ...]:
        """Return the column of the predicted number."""
        return ("prediction",)

    def rows(self, example: Example, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the predicted number."""
        yield (f"{outcome['value'][0]:.6g}",)

    def figures(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> list[tuple[str, Any]]:
        """Return predicted against measured numbers."""
        labels, values = _labels_and(examples, outcomes, "value")
        return [("Predicted against measured", figures.scatter(labels, values))]


class Classes(Task):
    """What tasks with classes share: their names, from the task itself or from the training split.

    Attributes:
        classes: Names of the classes, a class's number is its place.
    """

    classes: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """Return the names of the classes."""
        return {"classes": list(self.classes)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        self.classes = tuple(state["classes"])


class Classification(Classes):
    """A class a protein, by cross-entropy.

    Attributes:
        key: Name of the label in a record, a number from 0; empty takes the names in the table's target column.
        num_classes: How many there are, where they are numbers.
    """

    key: ClassVar[str] = ""
    num_classes: ClassVar[int] = 0
    heads = PROTEIN_HEADS
    metric = "top1_accuracy"

    def label_of(self, record: dict[str, Any], num_residues: int) -> NDArray[Any]:
        """Return the class, int64 [1]; of named classes its name, which :meth:`learn` and :meth:`check` number."""
        value = _found(record, self.key or self.labels.target)
        if not self.key:
            if str(value).strip() in ("", "nan", "NaN", "None"):
                raise BadLabel("has no label")
            return np.array([str(value).strip()])
        number = np.asarray(value).reshape(-1)
        if len(number) != 1 or number.dtype.kind not in "iu":
            raise BadLabel(f"the label {str(value)[:40]} is not one whole number")
        if not 0 <= number[0] < self.num_classes:
            raise BadLabel(f"the class {number[0]} is outside 0 to {self.num_classes - 1}")
        return number.astype(np.int64)

    def learn(self, examples: Sequence[Example], config: HeadConfig) -> None:
        """Take the names of the classes."""
        if self.key:
            self.classes = tuple(map(str, range(self.num_classes)))
            return
        self.classes = tuple(sorted({str(example.label[0]) for example in examples}))
        if len(self.classes) < 2:
            raise InputError(f"the training split has {len(self.classes)} class in column '{self.labels.target}'; a "
                             "classification needs two or more.")  # fmt: skip

    def check(self, examples: Sequence[Example], place: str) -> None:
        """Raise InputError for a class that the training split has not."""
        for example in examples:
            if not self.key and str(example.label[0]) not in self.classes:
                raise InputError(f"{place}, record {example.record}: the training split has no class "
                                 f"'{example.label[0]}'; correct the label or add such proteins there.")  # fmt: skip

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return a head with one output a class."""
        name, num_classes = self.head_name(config), len(self.classes)
        return protein_head(name, encoder.hidden_size, config.hidden_size, num_classes, config.dropout)

    def _numbers(self, examples: Sequence[Example]) -> NDArray[np.int64]:
        if self.key:
            return np.concatenate([example.label for example in examples])
        places = {name: number for number, name in enumerate(self.classes)}
        return np.array([places[str(example.label[0])] for example in examples])

    def loss(self, outputs: Any, examples: Sequence[Example]) -> Tensor:
        """Return the sum of cross-entropies."""
        labels = concatenated([self._numbers(examples)], outputs)
        return functional.cross_entropy(outputs.float(), labels, reduction="sum")

    def outcomes(self, outputs: Any, examples: Sequence[Example]) -> list[Outcome]:
        """Return the five most probable classes of each protein and their probabilities."""
        chances, classes = outputs.float().softmax(dim=1).topk(min(5, len(self.classes)), dim=1)
        pairs = zip(classes.cpu().numpy(), chances.cpu().numpy(), strict=True)
        return [{"classes": places, "probabilities": values} for places, values in pairs]

    def metrics(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return accuracies over proteins and the mean F1 over classes."""
        labels, classes = self._numbers(examples), np.stack([outcome["classes"] for outcome in outcomes])
        is_hit, ones = classes == labels[:, None], np.ones(len(labels))
        return {
            "top1_accuracy": ratio(is_hit[:, 0].astype(float), ones),
            "top5_accuracy": ratio(is_hit.any(axis=1).astype(float), ones),
            "f1_macro": macro_f1(labels, classes[:, 0], len(self.classes)),
        }

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return {
            "top1_accuracy": "Share of proteins whose most probable class is theirs.",
            "top5_accuracy": "Share of proteins whose class is among the five most probable.",
            "f1_macro": "Mean F1 over the classes that occur in the split or are predicted there.",
        }

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the most probable classes."""
        return ("prediction", "probability", "five_most_probable")

    def rows(self, example: Example, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the most probable class, its probability, and the five most probable classes."""
        names = [self.classes[number] for number in outcome["classes"]]
        yield names[0], f"{outcome['probabilities'][0]:.4f}", " ".join(names)

    def figures(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> list[tuple[str, Any]]:
        """Return the confusion matrix."""
        labels = self._numbers(examples)
        predictions = np.array([outcome["classes"][0] for outcome in outcomes])
        counts = np.zeros((len(self.classes),) * 2)
        np.add.at(counts, (labels, predictions), 1)
        return [("Confusion matrix (share of the true class)", figures.confusion(counts, self.classes))]


class ResidueClassification(Classes):
    """A class a residue, by cross-entropy over the labelled residues; a label is int64 [num_residues], -1 for none."""

    heads = RESIDUE_HEADS
    metric = "accuracy"

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return a head with one output a class."""
        name, num_classes = self.head_name(config), len(self.classes)
        return residue_head(name, encoder.hidden_size, config.hidden_size, num_classes, config.dropout)

    def weight(self, example: Example) -> float:
        """Return the number of labelled residues."""
        return float((self.labels_of(example) >= 0).sum())

    def labels_of(self, example: Example) -> NDArray[np.int64]:
        """Return the label of each residue that the loss and the metrics count, -1 for none."""
        return example.label

    def loss(self, outputs: Any, examples: Sequence[Example]) -> Tensor:
        """Return the sum of cross-entropies over labelled residues."""
        labels = concatenated(map(self.labels_of, examples), outputs)
        return functional.cross_entropy(outputs.float(), labels, ignore_index=NO_LABEL, reduction="sum")

    def outcomes(self, outputs: Any, examples: Sequence[Example]) -> list[Outcome]:
        """Return the most probable class of each residue."""
        lengths = [len(example.residues) for example in examples]
        return [{"classes": part.numpy().astype(np.uint8)} for part in outputs.argmax(dim=1).cpu().split(lengths)]

    def confusions(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
        """Return each protein's counts [num_proteins, true classes, predicted classes]."""
        size = len(self.classes)
        counts = np.zeros((len(examples), size * size))
        for place, (example, outcome) in enumerate(zip(examples, outcomes, strict=True)):
            labels = self.labels_of(example)
            is_labelled = labels >= 0
            pairs = labels[is_labelled] * size + outcome["classes"][is_labelled]
            counts[place] = np.bincount(pairs, minlength=size * size)
        return counts.reshape(-1, size, size)

    def metrics(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return accuracies over residues and proteins, and F1 by class."""
        confusions = self.confusions(examples, outcomes)
        hits, totals = np.trace(confusions, axis1=1, axis2=2), confusions.sum(axis=(1, 2))
        scores = {f"f1_{name}": f1(confusions, number) for number, name in enumerate(self.classes)}
        return {
            "accuracy": ratio(hits, totals),
            "accuracy_per_protein": mean_ratio(hits, totals),
            "f1_macro": mean_of(list(scores.values())),
            **scores,
        }

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return {
            "accuracy": "Share of labelled residues whose most probable class is theirs, over the whole split.",
            "accuracy_per_protein": "The same share within each protein, mean over proteins.",
            "f1_macro": "Mean of the F1 of all classes.",
            **{f"f1_{name}": f"F1 of the class {name} over labelled residues." for name in self.classes},
        }

    def columns(self) -> tuple[str, ...]:
        """Return the columns: the sequence and a letter a residue below it."""
        return ("sequence", "prediction")

    def rows(self, example: Example, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the sequence and the class of each residue."""
        letters = [self.classes[number] for number in outcome["classes"]]
        separator = "" if all(len(name) == 1 for name in self.classes) else " "
        yield example.sequence, separator.join(letters)

    def figures(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> list[tuple[str, Any]]:
        """Return the confusion matrix over residues."""
        counts = self.confusions(examples, outcomes).sum(axis=0)
        return [("Confusion matrix (share of the true class)", figures.confusion(counts, self.classes))]


def _found(record: dict[str, Any], key: str) -> Any:
    """Return a record's value; raises BadLabel where there is none."""
    if record.get(key) is None:
        there = ", ".join(map(repr, list(record)[:8]))
        raise BadLabel(f"has no label '{key}', only {there}")
    return record[key]


def _is_numbers(value: Any) -> bool:
    """Tell whether a value is a number or an array of numbers."""
    try:
        return np.asarray(value).dtype.kind in "iuf"
    except ValueError:  # lists of unequal lengths
        return False


def _labels_and(
    examples: Sequence[Example], outcomes: Sequence[Outcome], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return labels and one named number of the predictions, both [num_proteins]."""
    labels = np.concatenate([example.label for example in examples])
    return labels, np.concatenate([outcome[name] for outcome in outcomes])
