"""A data folder as the task function takes it: read and split once, proteins and what is derived of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from megaprot.finetune.config_function import SplitConfig
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.function_metrics import training_content
from megaprot.finetune.function.sampling import Unknown
from megaprot.finetune.function.splits import TEST, VALID, FunctionSplit


@dataclass(frozen=True)
class Protein:
    """One protein of a split.

    Attributes:
        number: Its place in the data, over all splits.
        identifier: Its name.
        residues: Ids of its residues, uint8 [num_residues].
        terms: Numbers of the terms it has and a run may know, int64.
        split: TRAIN, VALID or TEST.
    """

    number: int
    identifier: str
    residues: NDArray[np.unsignedinteger[Any]]
    terms: NDArray[np.int64]
    split: int


@dataclass(frozen=True, eq=False)
class Source:
    """A data folder, read and split once, however many splits and runs are read of it.

    Attributes:
        folder: The folder.
        split_config: How it was split.
        data: Proteins and labels.
        split: Which of them and of the terms are whose.
    """

    folder: Path
    split_config: SplitConfig
    data: FunctionData
    split: FunctionSplit

    @cached_property
    def training_labels(self) -> csr_array:
        """Labels of training proteins and seen terms, bool [num_proteins, num_terms]."""
        return self.split.training_labels(self.data.labels)

    @cached_property
    def content(self) -> NDArray[np.float64]:
        """Information content of each term in bits, [num_terms]."""
        return training_content(self.data, self.split)

    @cached_property
    def scored(self) -> tuple[NDArray[np.int64], ...]:
        """Terms scored in each split; of training proteins those of the test, for the cells of seen proteins."""
        return tuple(self.split.terms_of(split) for split in (TEST, VALID, TEST))

    @cached_property
    def unknown(self) -> Unknown:
        """Which absent labels do not count when losses are measured."""
        return Unknown(self.data.ontology, self.data.labels)
