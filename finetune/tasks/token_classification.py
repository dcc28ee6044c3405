"""A class a residue, from a table of your own: a letter for each residue in the target column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.finetune.config import HeadConfig
from megaprot.finetune.examples import BadLabel, Example
from megaprot.finetune.kinds import NO_LABEL, ResidueClassification

_UNLABELLED = "."


class TokenClassification(ResidueClassification):
    """A label is the letters' codes, int64 [num_residues]; the training split's letters are the classes."""

    name = folder = "token_classification"

    def label_of(self, record: dict[str, Any], num_residues: int) -> NDArray[Any]:
        """Return the code of each residue's letter."""
        text = record.get(self.labels.target)
        if not isinstance(text, str):
            raise BadLabel(f"has no text '{self.labels.target}' with a letter a residue")
        if len(text) != num_residues:
            raise BadLabel(f"has {len(text)} letters in '{self.labels.target}' for {num_residues} residues")
        return np.array([ord(letter) for letter in text], dtype=np.int64)

    def learn(self, examples: Sequence[Example], config: HeadConfig) -> None:
        """Take the letters that occur."""
        codes = set(np.unique(np.concatenate([example.label for example in examples])).tolist())
        self.classes = tuple(sorted(map(chr, codes - {ord(_UNLABELLED)})))
        if len(self.classes) < 2:
            raise InputError(f"the training split has {len(self.classes)} classes of residues in column "
                             f"'{self.labels.target}'; a classification needs two or more.")  # fmt: skip

    def check(self, examples: Sequence[Example], place: str) -> None:
        """Raise InputError for a letter that the training split has not."""
        for example in examples:
            strange = set(map(chr, example.label.tolist())) - {*self.classes, _UNLABELLED}
            if strange:
                raise InputError(f"{place}, record {example.record}: the training split has no class "
                                 f"'{min(strange)}'; correct the label or add such proteins there.")  # fmt: skip

    def labels_of(self, example: Example) -> NDArray[np.int64]:
        """Return the number of each residue's class, -1 for '.'."""
        table = np.full(int(example.label.max(initial=0)) + 1, NO_LABEL)
        for number, name in enumerate(self.classes):
            if ord(name) < len(table):
                table[ord(name)] = number
        return table[example.label]


TASK = TokenClassification
