"""The data stream: which packed, masked rows each data-parallel rank reads at each optimizer step.

A row is a pure function of (seed, corpus, epoch, row number), and the rows of a step one of the stream's position.
Nothing else enters, so that the stream is the same under any number of loader processes, data-parallel ranks and
restarts. Ranks of one model replica (tensor, pipeline) build the same rows from their own memory maps; nothing is
broadcast.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import key, uniform_bits
from megaprot.common.errors import InputError
from megaprot.common.packing import PackedRow
from megaprot.common.packing_plan import check_row_shape
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.epoch_plans import EpochPlans
from megaprot.pretrain.rows import RowBuilder, RowShape

_BLEND, _CORPUS = 6, 7  # what a key is drawn for, see ``megaprot.pretrain.rows``


@dataclass(frozen=True)
class CorpusPosition:
    """The next row to be read of one corpus: row ``row`` of epoch ``epoch``, both from 0."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class StreamPosition:
    """The next row to be read: ``num_read`` are behind it, and each corpus of the blend stands at its own position."""

    num_read: int = 0
    corpora: tuple[CorpusPosition, ...] = (CorpusPosition(),)

    def to_dict(self) -> dict[str, Any]:
        """Return the position as plain values, for a checkpoint."""
        return {"num_read": self.num_read, "corpora": [asdict(corpus) for corpus in self.corpora]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StreamPosition":
        """Return the position that ``to_dict`` wrote; raises InputError for anything else."""
        try:
            position = cls(values["num_read"], tuple(CorpusPosition(**corpus) for corpus in values["corpora"]))
        except (TypeError, KeyError):
            position = cls(-1)
        numbers = [position.num_read, *(number for corpus in position.corpora for number in asdict(corpus).values())]
        if not position.corpora or not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"{values} is no data position of this version: resume from another checkpoint")
        return position


class TrainingStream:
    """The endless stream of training rows of one corpus, or of several in given shares.

    Each corpus is read epoch after epoch, in each of which every sequence (or one member of every cluster) comes once,
    in new rows each time. Which corpus the n-th row comes from is drawn with the weights, from (seed, n).
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        shape: RowShape,
        seed: int,
        weights: Sequence[float] = (1.0,),
        by_clusters: bool = False,
        plan_folder: str = "",
    ) -> None:
        """Take corpora and, of each, its share of the rows. Raises InputError for lengths that do not fit a row."""
        for corpus in corpora:
            check_row_shape(shape.row_tokens, shape.max_sequence_length, corpus.vocabulary.num_boundary_tokens)
        seeds = [int(key(_CORPUS, seed, number)) for number in range(len(corpora))]
        self.builders = [
            RowBuilder(corpus, shape, own, by_content=False) for corpus, own in zip(corpora, seeds, strict=True)
        ]
        self._plans = [
            EpochPlans(corpus, shape, own, by_clusters, plan_folder) for corpus, own in zip(corpora, seeds, strict=True)
        ]
        self._blend_key = key(_BLEND, seed)
        shares = np.cumsum(np.asarray(weights, dtype=np.float64))
        self._drawn_below = np.round(shares / shares[-1] * 2**32).astype(np.uint64)

    @property
    def start(self) -> StreamPosition:
        """The position of the first row."""
        return StreamPosition(0, (CorpusPosition(),) * len(self.builders))

    def num_rows(self, epoch: int, corpus: int = 0) -> int:
        """Return the number of rows of an epoch of a corpus; epochs may differ by a few."""
        return self._plans[corpus].plan(epoch).num_rows

    def sequences(self, corpus: int, epoch: int, index: int) -> NDArray[np.int64]:
        """Return the numbers of the sequences in row ``index`` of an epoch of a corpus."""
        return self._plans[corpus].plan(epoch).row(index)

    def row(self, epoch: int, index: int, corpus: int = 0) -> PackedRow:
        """Return row ``index`` of an epoch of a corpus: a pure function of the stream's arguments and these."""
        return self.builders[corpus].build(epoch, self.sequences(corpus, epoch, index))

    def advance(self, position: StreamPosition, num_rows: int) -> StreamPosition:
        """Return the position ``num_rows`` further on. Raises InputError for a position outside of these corpora."""
        if len(position.corpora) != len(self.builders):
            raise InputError(
                f"the data position is one of {len(position.corpora)} corpora, not {len(self.builders)}: resume with "
                "the corpora that the run was started with"
            )
        counts = np.bincount(self._corpus_of_rows(position, num_rows), minlength=len(self.builders))
        moved = (self._advance(number, at, int(counts[number])) for number, at in enumerate(position.corpora))
        return StreamPosition(position.num_read + num_rows, tuple(moved))

    def rows_of_step(
        self, position: StreamPosition, global_batch_rows: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[tuple[int, int, int]]:
        """Return (corpus, epoch, row) of each row that a rank reads of the global batch at ``position``.

        Row j of the batch goes to rank j % data_parallel_size, so that the batch is the same rows for any size; the
        size must divide the batch.
        """
        _check_even(global_batch_rows, data_parallel_size)
        corpus_of = self._corpus_of_rows(position, global_batch_rows)
        rows = []
        before = np.zeros(global_batch_rows, dtype=np.int64)  # rows of the same corpus earlier in the batch
        for corpus in range(len(self.builders)):
            chosen = np.flatnonzero(corpus_of == corpus)
            before[chosen] = np.arange(len(chosen))
        for row in range(data_parallel_rank, global_batch_rows, data_parallel_size):
            corpus = int(corpus_of[row])
            at = self._advance(corpus, position.corpora[corpus], int(before[row]))
            rows.append((corpus, at.epoch, at.row))
        return rows

    def _corpus_of_rows(self, position: StreamPosition, num_rows: int) -> NDArray[np.int64]:
        """Return the corpus of each of the next rows, int64 [num_rows]."""
        draws = uniform_bits(self._blend_key, np.arange(position.num_read, position.num_read + num_rows))
        return np.searchsorted(self._drawn_below, draws >> np.uint64(32), side="right")

    def _advance(self, corpus: int, position: CorpusPosition, num_rows: int) -> CorpusPosition:
        epoch, row = position.epoch, position.row
        if row >= self.num_rows(epoch, corpus):
            raise InputError(
                f"the data position is row {row} of epoch {epoch}, which has {self.num_rows(epoch, corpus)} rows here: "
                "resume with the corpus and the row shape that the run was started with"
            )
        row += num_rows
        while row >= self.num_rows(epoch, corpus):
            row -= self.num_rows(epoch, corpus)
            epoch += 1
        return CorpusPosition(epoch, row)


class ValidationStream:
    """A fixed list of rows whose crops and masks depend on each sequence alone, so that losses compare between runs.

    ``max_rows`` keeps only that many rows (0: all), of each corpus its share by ``weights``, but at least one; they are
    a random sample, since rows stand in random order.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        shape: RowShape,
        weights: Sequence[float] = (1.0,),
        max_rows: int = 0,
        plan_folder: str = "",
    ) -> None:
        """Take corpora and the shape of a row. Raises InputError for lengths that do not fit."""
        self.builders = [RowBuilder(corpus, shape, 0, by_content=True) for corpus in corpora]
        self._plans = [EpochPlans(corpus, shape, 0, folder=plan_folder).plan(0) for corpus in corpora]
        self._rows: list[tuple[int, int]] = []
        for corpus, (plan, weight) in enumerate(zip(self._plans, weights, strict=True)):
            share = max(1, round(max_rows * weight / sum(weights))) if max_rows else plan.num_rows
            self._rows += [(corpus, row) for row in range(min(share, plan.num_rows))]

    @property
    def num_rows(self) -> int:
        """Number of rows that are used."""
        return len(self._rows)

    def row(self, index: int) -> PackedRow:
        """Return row ``index``."""
        corpus, row = self._rows[index]
        return self.builders[corpus].build(0, self._plans[corpus].row(row))

    def num_batches(self, batch_rows: int) -> int:
        """Return how many batches of ``batch_rows`` rows hold all rows, the last one filled with blank rows."""
        return -(-self.num_rows // batch_rows)

    def rows_of_batch(
        self, batch: int, batch_rows: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[tuple[int, NDArray[np.int64]]]:
        """Return (corpus, sequence numbers) of each row that a rank reads of a batch, no sequences for a blank row.

        Every rank gets as many rows as the others; their number must divide the batch.
        """
        _check_even(batch_rows, data_parallel_size)
        rows = range(batch * batch_rows + data_parallel_rank, (batch + 1) * batch_rows, data_parallel_size)
        return [
            (corpus, self._plans[corpus].row(row))
            for corpus, row in (self._rows[index] for index in rows if index < self.num_rows)
        ] + [(0, np.empty(0, dtype=np.int64))] * sum(index >= self.num_rows for index in rows)


def _check_even(batch_rows: int, data_parallel_size: int) -> None:
    if batch_rows <= 0 or batch_rows % data_parallel_size:
        raise ValueError(f"{batch_rows} rows cannot be dealt evenly to {data_parallel_size} ranks")
