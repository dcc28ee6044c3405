"""Numbers others have published on TAPE's tasks, each with the split and the definition of its metric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One number.

    Attributes:
        task: Ours.
        split: What it was measured on.
        metric: Our name of the metric as its authors define it; empty where theirs is not known well enough.
        model: Whose.
        value: The number.
        source: Where it is published.
    """

    task: str
    split: str
    metric: str
    model: str
    value: float
    source: str


_TAPE = "TAPE (Rao et al. 2019), table of its repository"
_PROTEINLM = "ProteinLM (Xiao et al. 2021), readme of its repository"
_TAPE_MODELS = ("one-hot + alignment", "LSTM", "ResNet", "Transformer", "Bepler", "UniRep", "one-hot")
_TAPE_ROWS = (
    ("secondary_structure", "cb513", "tape_accuracy", (0.80, 0.75, 0.75, 0.73, 0.73, 0.73, 0.69)),
    ("contact_prediction", "test", "", (0.64, 0.39, 0.29, 0.36, 0.40, 0.34, 0.29)),
    ("remote_homology", "test_fold_holdout", "top1_accuracy", (0.09, 0.26, 0.17, 0.21, 0.17, 0.23, 0.09)),
    ("fluorescence", "test", "spearman", (None, 0.67, 0.21, 0.68, 0.33, 0.67, 0.14)),
    ("stability", "test", "spearman", (None, 0.69, 0.73, 0.73, 0.64, 0.73, 0.19)),
)
_PROTEINLM_ROWS = (
    ("secondary_structure", "cb513", "tape_accuracy", (0.75, 0.79)),
    ("contact_prediction", "test", "proteinlm_precision_at_l5", (0.52, 0.75)),
    ("remote_homology", "test_fold_holdout", "top1_accuracy", (0.26, 0.30)),
    ("fluorescence", "test", "spearman", (0.68, 0.68)),
    ("stability", "test", "spearman", (0.77, 0.79)),
)
PUBLISHED = [
    *(Published(task, split, metric, model, value, _TAPE)
      for task, split, metric, values in _TAPE_ROWS
      for model, value in zip(_TAPE_MODELS, values, strict=True) if value is not None),
    *(Published(task, split, metric, f"ProteinLM {size}", value, _PROTEINLM)
      for task, split, metric, values in _PROTEINLM_ROWS
      for size, value in zip(("200M", "3B"), values, strict=True)),
]  # fmt: skip
NOTES = {
    "contact_prediction": "TAPE's article says medium and long range, L/5; its TensorFlow code, which made the table, "
    "counts both triangles from separation 6 on; its PyTorch code averages over batches. ProteinLM's cells may come "
    "from either of its two codes.",
}


def published_for(task: str) -> list[Published]:
    """Return the published numbers of a task."""
    return [number for number in PUBLISHED if number.task == task]
