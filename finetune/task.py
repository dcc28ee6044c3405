"""What a task is: how labels are read, which head predicts them, loss, metrics, and how predictions are written.

A task is one file in ``megaprot/finetune/tasks`` (or any Python file named with ``--task``) with a class ``TASK``. The
training loop, evaluation and prediction know no more of it than what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.examples import find_split, read_examples, read_unlabelled
from megaprot.finetune.gradient_caching import Block
from megaprot.finetune.metrics import Weighted
from megaprot.finetune.micro_batches import MicroBatch
from megaprot.finetune.protein_states import Proteins, gather_proteins, whole_states
from megaprot.finetune.report import Section

Outcome = dict[str, NDArray[Any]]
"""What is kept of one example's prediction: small arrays by name, the same names for every example of a task."""


class EncoderAndHead(nn.Module):
    """An encoder and a head as one module.

    Args:
        encoder: The encoder.
        head: What learns beside it.
        is_frozen: Whether the encoder only reads: no gradients, no dropout.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, is_frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.head, self.is_frozen = encoder, head, is_frozen
        if is_frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off; a frozen encoder has none."""
        super().train(mode)
        if self.is_frozen:
            self.encoder.eval()
        return self


class TaskModel(EncoderAndHead):
    """Proteins in, the head's outputs out; the head gets the row of whole proteins and its states."""

    def forward(self, proteins: Proteins) -> Any:
        """Return the head's outputs for proteins on the model's device."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            states = whole_states(self.encoder, proteins)
        return self.head(proteins.whole, states)


class Task(ABC):
    """One kind of label.

    An example is one protein (:class:`megaprot.finetune.examples.Example`) unless the task reads something else: then
    it overrides what looks into examples, from :meth:`read` to :meth:`collate`.

    Attributes:
        name: What ``--task`` calls it.
        folder: What TAPE calls its data.
        heads: Names of its heads; the first is the default.
        metric: The validation metric that chooses the best model.
        higher_is_better: Whether more of it is better.
        unit: What its examples are called, in the plural.
        also_reads: Names of other tasks whose models it scores with.
        scores_terms: Whether ``megaprot predict`` asks it for terms of an ontology, or functions in words.
        needs_lm_head: Whether training uses the encoder's masked-language head, which is then loaded and kept.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "proteins"
    also_reads: ClassVar[tuple[str, ...]] = ()
    needs_lm_head: bool = False
    scores_terms: ClassVar[bool] = False

    def __init__(self, labels: LabelConfig) -> None:
        self.labels = labels

    def configure(self, config: FinetuneConfig) -> None:  # noqa: B027 - most tasks need none
        """Take a training run's settings; what scoring needs of them goes through :meth:`state`."""

    def place_of(self, data: Path, split: str) -> str:
        """Return what messages call a split's file; raises InputError where there is none."""
        return str(find_split(data, self.folder, split).path)

    def read(self, data: Path, split: str, vocabulary: Vocabulary) -> list[Any]:
        """Return the examples of a split, none left out.

        Raises:
            InputError: There is no such split, or a record cannot be used.
        """
        return read_examples(find_split(data, self.folder, split), self.labels, vocabulary, self.label_of)

    def read_unlabelled(self, path: Path, vocabulary: Vocabulary, columns: Columns) -> list[Any]:
        """Return the proteins of any sequence file, for prediction; each has an ``identifier``.

        Raises:
            InputError: The file or a record cannot be used.
        """
        return list(read_unlabelled(path, vocabulary, columns))

    def training_examples(self, examples: list[Any]) -> list[Any]:
        """Return what one epoch goes over, made of the training split."""
        return examples

    def num_tokens(self, example: Any, encoder: Encoder) -> int:
        """Return how many tokens of an example the encoder reads."""
        return len(example.residues) + encoder.vocabulary.num_boundary_tokens

    def num_residues(self, example: Any) -> int:
        """Return the residues of an example."""
        return len(example.residues)

    def digest_of(self, example: Any) -> bytes:
        """Return bytes that change where input or label of an example do."""
        found: bytes = example.residues.tobytes() + example.label.tobytes()
        return found

    def notes(self, examples: Sequence[Any], encoder: Encoder) -> list[str]:
        """Return lines that a run begins with: what is done with examples that do not fit the encoder."""
        num_long = sum(0 < encoder.longest < len(example.residues) for example in examples)
        if not num_long:
            return []
        return [f"{num_long:,} proteins are longer than the encoder's {encoder.longest:,} residues: read in windows "
                "that share a quarter, averaged by residue"]  # fmt: skip

    def collate(self, encoder: Encoder, examples: Sequence[Any], seed: int | None) -> Any:
        """Return what the model is called with, on the CPU; its ``.to(device)`` moves it.

        Args:
            encoder: Says how proteins are read.
            examples: Of one micro-batch.
            seed: Of what is drawn in training (masks, negatives); None when scoring, where nothing is drawn.
        """
        return gather_proteins(encoder.vocabulary, encoder.longest, [example.residues for example in examples])

    def block(self, model: Any, examples: Sequence[Any], batches: Sequence[MicroBatch], seed: int) -> Block | None:
        """Return a training step whose micro-batches have one loss together; None where each has its own.

        Args:
            model: What :meth:`build_model` made.
            examples: The training split.
            batches: This process's micro-batches of the step.
            seed: Of what is drawn for the step.
        """
        return None

    def further_encoders(self, model: Any) -> dict[str, tuple[Any, Path]]:
        """Return {folder: (a module with transformers' model as ``model``, folder it came from)} beside the encoder.

        They are written into the model's folder as the encoder is.
        """
        return {}

    def write_files(self, folder: Path) -> None:  # noqa: B027 - most tasks have none
        """Write into a model's folder what is too large for :meth:`state`."""

    def read_files(self, folder: Path) -> None:  # noqa: B027
        """Take from a model's folder what stands there beside head and encoder, before they are built.

        Raises:
            InputError: It is missing or damaged.
        """

    def head_name(self, config: HeadConfig) -> str:
        """Return the head that ``config`` names; raises InputError where the task has none such."""
        name = self.heads[0] if config.name == "auto" else config.name
        if name not in self.heads:
            raise InputError(f"--head.name {name}: the task {self.name} has the heads {', '.join(self.heads)}.")
        return name

    def label_of(self, record: dict[str, Any], num_residues: int) -> NDArray[Any]:
        """Return the label of a raw record; raises BadLabel for what cannot be used."""
        raise NotImplementedError(f"the task {self.name} reads no records of single proteins")

    def learn(self, examples: Sequence[Any], config: HeadConfig) -> None:  # noqa: B027 - most tasks need none
        """Take from the training split what belongs to the model: classes, mean and spread of the labels.

        Attributes are assigned, never changed in place: the runs of a grid are shallow copies of one task.
        """

    def check(self, examples: Sequence[Any], place: str) -> None:  # noqa: B027
        """Raise InputError where labels of a split do not fit what was learned; ``place`` names its file."""

    def state(self) -> dict[str, Any]:
        """Return what was learned, as JSON can hold it."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take what :meth:`state` gave."""

    @abstractmethod
    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return the head that ``config`` names, with random weights."""

    def build_model(self, encoder: Encoder, head: nn.Module, is_frozen: bool) -> nn.Module:
        """Return encoder and head as one module."""
        return TaskModel(encoder, head, is_frozen)

    def weight(self, example: Any) -> float:
        """Return how many labels of an example the loss counts."""
        return 1.0

    @abstractmethod
    def loss(self, outputs: Any, examples: Sequence[Any]) -> Tensor:
        """Return the sum of the losses of all labels, fp32; the loop divides it by the step's :meth:`weight`."""

    @abstractmethod
    def outcomes(self, outputs: Any, examples: Sequence[Any]) -> list[Outcome]:
        """Return what is kept of each example's prediction; labels are not looked at where there are none."""

    def joined(self, examples: Sequence[Any], outcomes: list[Outcome]) -> Any:
        """Return the outcomes of a whole labelled split as :meth:`finish`, :meth:`metrics` and the report take them.

        Made once, on rank 0; for most tasks the list itself.
        """
        return outcomes

    def finish(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> None:  # noqa: B027 - most tasks need none
        """Take from the validation split what belongs to the model, such as a threshold; on rank 0, at each validation.

        The model that is written then has it in its :meth:`state`.
        """

    @abstractmethod
    def metrics(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return the metrics of a whole split, as functions of the examples' weights."""

    @abstractmethod
    def definitions(self) -> dict[str, str]:
        """Return {metric: what it is, in one sentence}."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the columns of a table of predictions, after the identifier."""

    @abstractmethod
    def rows(self, example: Any, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the cells of one example's predictions, one tuple a row of the table."""

    def figures(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> list[tuple[str, Any]]:
        """Return (title, matplotlib figure) of what the report shows of a split."""
        return []

    def sections(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> list[Section]:
        """Return what the report of a split holds beside metrics and figures."""
        return []


def concatenated(arrays: Iterable[NDArray[Any]], like: Tensor) -> Tensor:
    """Return arrays one after another as a tensor on the device of ``like``."""
    return torch.from_numpy(np.concatenate(list(arrays))).to(like.device)
