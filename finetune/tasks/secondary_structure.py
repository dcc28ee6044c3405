"""Secondary structure by residue, in three or eight classes (TAPE, after NetSurfP-2.0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.finetune.config import LabelConfig
from megaprot.finetune.examples import BadLabel, Example
from megaprot.finetune.kinds import NO_LABEL, ResidueClassification
from megaprot.finetune.metrics import Weighted, ratio
from megaprot.finetune.task import Outcome

_CLASSES = {3: ("H", "E", "C"), 8: ("G", "H", "I", "B", "E", "S", "T", "C")}


class SecondaryStructure(ResidueClassification):
    """DSSP's classes of each residue; residues that ``valid_mask`` leaves out count neither in loss nor in accuracy.

    A label is int64 [2, num_residues]: the classes, and which of them count.
    """

    name = folder = "secondary_structure"

    def __init__(self, labels: LabelConfig) -> None:
        super().__init__(labels)
        if labels.num_classes not in (0, *_CLASSES):
            raise InputError(f"--labels.num_classes {labels.num_classes}: secondary structure has 3 or 8 classes.")
        self.classes = _CLASSES[labels.num_classes or 3]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave: the number of classes is the model's, not the default."""
        super().restore(state)
        self.labels.num_classes = len(self.classes)

    def label_of(self, record: dict[str, Any], num_residues: int) -> NDArray[Any]:
        """Return classes and whether they count."""
        key = f"ss{len(self.classes)}"
        if key not in record:
            raise BadLabel(f"has no label '{key}', only {', '.join(map(repr, list(record)[:8]))}")
        try:
            classes, counts = np.asarray(record[key]), np.asarray(record.get("valid_mask", np.ones(num_residues)))
        except ValueError:  # lists of unequal lengths
            classes = counts = np.empty(0)
        for name, values in ((key, classes), ("valid_mask", counts)):
            if values.shape != (num_residues,):
                raise BadLabel(f"has {values.size} values of '{name}' for {num_residues} residues")
        if classes.dtype.kind not in "iu" and not np.array_equal(classes, np.round(classes)):
            raise BadLabel(f"'{key}' holds something else than whole numbers")
        outside = classes[(classes < NO_LABEL) | (classes >= len(self.classes))]
        if len(outside):
            raise BadLabel(f"the class {outside[0]} of '{key}' is outside 0 to {len(self.classes) - 1}")
        return np.stack((classes.astype(np.int64), counts.astype(bool).astype(np.int64)))

    def labels_of(self, example: Example) -> NDArray[np.int64]:
        """Return the classes that count, -1 elsewhere."""
        return np.where(example.label[1] > 0, example.label[0], NO_LABEL)

    def metrics(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return those of all such tasks, and TAPE's accuracy."""
        pairs = [(example.label[0], outcome["classes"]) for example, outcome in zip(examples, outcomes, strict=True)]
        hits = np.array([((labels == classes) & (labels >= 0)).sum() for labels, classes in pairs], dtype=float)
        totals = np.array([(labels >= 0).sum() for labels, _ in pairs], dtype=float)
        return super().metrics(examples, outcomes) | {"tape_accuracy": ratio(hits, totals)}

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return super().definitions() | {
            "tape_accuracy": "TAPE's and ProteinLM's: as accuracy, over all residues with a class, valid or not.",
        }


TASK = SecondaryStructure
