"""All pairs of two sets of proteins, block by block: what is kept of a block is written before the next is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from megaprot.common.errors import RunError
from megaprot.finetune.best_places import best_places
from megaprot.finetune.pairs.scoring import PairScoring

Kept = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Rows, columns and logits of the pairs that are kept [num_kept]."""


@dataclass(frozen=True)
class Screen:
    """Which pairs are scored, and which are kept.

    Attributes:
        num_rows: Proteins of the first set.
        num_columns: Proteins of the second set.
        is_one_set: Whether both sets are the same proteins: none is paired with itself, and without ``top_k`` each
            pair is scored once, its first protein before its second in the set.
        top_k: Keep the best so many partners of each row; 0 keeps any number.
        least_logit: Keep pairs of at least this logit.
    """

    num_rows: int
    num_columns: int
    is_one_set: bool
    top_k: int
    least_logit: float

    @property
    def is_triangle(self) -> bool:
        """Whether each pair is scored once only."""
        return self.is_one_set and not self.top_k

    @property
    def num_pairs(self) -> int:
        """Pairs that are kept at most, or are to be scored without ``top_k``."""
        if self.is_triangle:
            return self.num_rows * (self.num_rows - 1) // 2
        return self.num_rows * (self.num_columns - self.is_one_set)


def blocks_of(screen: Screen, pairs_a_part: int) -> list[range]:
    """Return the rows of each block, about ``pairs_a_part`` pairs in each; no process count changes them."""
    size = max(1, pairs_a_part // max(1, screen.num_columns))
    return [range(start, min(start + size, screen.num_rows)) for start in range(0, screen.num_rows, size)]


def kept_of(scoring: PairScoring, screen: Screen, rows: range) -> Kept:
    """Score a block of rows and return what is kept of it, row by row.

    The pairs of a row are in the order of the second set; with ``top_k`` the best stand first, of equals the one that
    stands first in the set.

    Raises:
        RunError: A score is not finite.
    """
    offset = 0 if screen.is_one_set else screen.num_rows  # the second set's numbers follow the first's
    first_column = rows.start + 1 if screen.is_triangle else 0
    columns = np.arange(first_column, screen.num_columns)
    numbers = np.arange(rows.start, rows.stop)
    if not len(columns):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    is_wanted = np.ones((len(numbers), len(columns)), dtype=bool)
    if screen.is_one_set:
        is_wanted = columns > numbers[:, None] if screen.is_triangle else columns != numbers[:, None]
    logits = scoring.block(numbers, columns + offset, is_wanted)
    if not np.isfinite(logits[is_wanted]).all():
        raise RunError("the model gives scores that are not finite; check its weights.")
    is_pair = is_wanted & (logits >= screen.least_logit)
    chosen = list(_chosen(logits, is_pair, screen.top_k))
    counts = [len(one) for one in chosen]
    kept = np.concatenate(chosen)
    kept_rows = np.repeat(np.arange(len(numbers)), counts)
    return numbers[kept_rows], columns[kept], logits[kept_rows, kept].astype(np.float64)


def _chosen(logits: NDArray[np.float32], is_pair: NDArray[np.bool_], top_k: int) -> Iterator[NDArray[np.int64]]:
    """Yield which columns of each row are kept, in their order."""
    for values, allowed in zip(logits, is_pair, strict=True):
        places = np.flatnonzero(allowed)
        yield places[best_places(values[places], top_k)] if top_k else places


def lines_of(kept: Kept, first_names: Sequence[str], second_names: Sequence[str], temperature: float) -> bytes:
    """Return kept pairs as lines of a table: name, name, probability."""
    rows, columns, logits = kept
    chances = expit(logits / temperature)
    cells = zip(rows.tolist(), columns.tolist(), chances.tolist(), strict=True)
    lines = (f"{first_names[row]}\t{second_names[column]}\t{chance:.5g}\n" for row, column, chance in cells)
    return "".join(lines).encode()
