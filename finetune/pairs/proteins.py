"""The proteins behind pairs: equal sequences are one protein, whatever they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megaprot.finetune.pairs.files import PairExample

Degrees = dict[str, tuple[int, int]]
"""{key of a protein: (pairs that bind, pairs that do not) it is in}."""


def protein_key(residues: NDArray[np.integer]) -> str:
    """Return 16 hexadecimal digits that stand for a sequence, in files that outlive identifiers."""
    return hashlib.blake2b(np.ascontiguousarray(residues).tobytes(), digest_size=8).hexdigest()


class ProteinIndex:
    """Numbers proteins by their residues, in the order they are met.

    Attributes:
        residues: Ids of each protein's residues.
        keys: Key of each protein.
    """

    def __init__(self) -> None:
        self.residues: list[NDArray[np.integer]] = []
        self.keys: list[str] = []
        self._numbers: dict[str, int] = {}
        self._met: dict[int, tuple[NDArray[np.integer], int]] = {}  # one array is hashed once; kept, its id stays its

    def number(self, residues: NDArray[np.integer]) -> int:
        """Return the number of a protein, a new one where it is not known."""
        met = self._met.get(id(residues))
        if met is not None:
            return met[1]
        key = protein_key(residues)
        number = self._numbers.setdefault(key, len(self.keys))
        if number == len(self.keys):
            self.keys.append(key)
            self.residues.append(residues)
        self._met[id(residues)] = (residues, number)
        return number

    def places(self, examples: Iterable[PairExample]) -> NDArray[np.int64]:
        """Return the numbers of each pair's proteins, int64 [num_pairs, 2]."""
        found = [(self.number(one.residues_first), self.number(one.residues_second)) for one in examples]
        return np.array(found, dtype=np.int64).reshape(-1, 2)


def labels_of(examples: Sequence[PairExample]) -> NDArray[np.float64]:
    """Return 1 for pairs that bind and 0 for others [num_pairs]."""
    return np.array([one.label for one in examples], dtype=np.float64)


def unordered(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one number a pair, the same for both orders, of protein numbers [num_pairs, 2] below 2^31."""
    ordered = np.sort(places, axis=1)
    return ordered[:, 0] << 32 | ordered[:, 1]


def distinct(examples: Sequence[PairExample]) -> list[PairExample]:
    """Return pairs without repetitions, the first of each; the same pair with another label is another."""
    places, labels = ProteinIndex().places(examples), labels_of(examples).astype(np.int64)
    _, kept = np.unique(np.column_stack((unordered(places), labels)), axis=0, return_index=True)
    return [examples[place] for place in np.sort(kept).tolist()]


def degrees_of(examples: Sequence[PairExample]) -> Degrees:
    """Return in how many pairs that bind, and in how many that do not, each protein is."""
    index = ProteinIndex()
    places, labels = index.places(examples), labels_of(examples).astype(np.int64)
    counts = np.zeros((len(index.keys), 2), dtype=np.int64)
    for column in (0, 1):
        np.add.at(counts, (places[:, column], 1 - labels), 1)
    return {key: (positive, negative) for key, (positive, negative) in zip(index.keys, counts.tolist(), strict=True)}


def counts_of(degrees: Degrees, examples: Sequence[PairExample]) -> NDArray[np.int64]:
    """Return (pairs that bind, pairs that do not) of each pair's proteins, int64 [num_pairs, 2 proteins, 2 kinds]."""
    index = ProteinIndex()
    places = index.places(examples)
    table = np.array([degrees.get(key, (0, 0)) for key in index.keys], dtype=np.int64).reshape(-1, 2)
    return table[places]
