"""The data stream: which packed, masked rows each data-parallel rank reads at each optimizer step.

A row is a pure function of (seed, epoch, row number), and the rows of a step one of the stream's position. Nothing else
enters, so that the stream is the same under any number of loader processes, data-parallel ranks and restarts. Ranks of
one model replica (tensor, pipeline) build the same rows from their own memory maps; nothing is broadcast.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from megaprot.common.counter_random import below, key, keys, uniform_bits
from megaprot.common.errors import InputError, MegaprotError, RunError
from megaprot.common.masking import MaskingConfig, content_keys, mask_tokens
from megaprot.common.packing import PackedRow, PackingPlan, lay_out_row, plan_epoch
from megaprot.pretrain.corpus import Corpus

# What a key is drawn for, apart from the orders that ``megaprot.common.packing`` draws.
_CROP, _MASK = 3, 4
_NUM_PLANS_KEPT = 2  # workers read ahead, so that a step can need the plan of this epoch and of the next one
_STEPS_READ_AHEAD = 2  # by each worker


@dataclass(frozen=True)
class StreamPosition:
    """The next row to be read: row ``row`` of epoch ``epoch``, both from 0."""

    epoch: int = 0
    row: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the position as plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, int]) -> "StreamPosition":
        """Return the position that ``to_dict`` wrote; raises InputError for anything else."""
        if set(values) != {"epoch", "row"} or not all(type(value) is int and value >= 0 for value in values.values()):
            raise InputError(f"the data position {values} is not one of epoch and row: resume from another checkpoint")
        return cls(**values)


@dataclass(frozen=True)
class RowBuilder:
    """Builds the row that holds given sequences of a corpus. Small to send to another process.

    Crops and masks are drawn from (``seed``, epoch, sequence number) or, if ``by_content``, from the residues alone.
    """

    corpus: Corpus
    row_tokens: int
    max_sequence_length: int
    masking: MaskingConfig
    masked_capacity: int
    seed: int
    by_content: bool

    def build(self, epoch: int, sequence_ids: NDArray[np.int64]) -> PackedRow:
        """Return the row of ``sequence_ids`` [num_sequences], which must fit it; no sequences make a blank row."""
        starts, lengths = self._pieces(epoch, sequence_ids)
        vocabulary = self.corpus.vocabulary
        row = lay_out_row(np.asarray(self.corpus.residues), starts, lengths, self.row_tokens, vocabulary)
        if self.by_content:
            sequence_keys = content_keys(row.tokens[row.residue_positions], lengths)
        else:
            sequence_keys = keys(key(_MASK, self.seed, epoch), sequence_ids)
        residue_keys = np.repeat(sequence_keys, lengths)
        masked = mask_tokens(
            row.tokens,
            row.residue_positions,
            residue_keys,
            row.residue_counters,
            self.masking,
            vocabulary,
            self.masked_capacity,
        )
        return PackedRow(
            tokens=masked.tokens,
            positions=row.positions,
            cu_seqlens=row.cu_seqlens,
            num_sequences=len(sequence_ids),
            masked_positions=masked.masked_positions,
            labels=masked.labels,
            masked_kind=masked.masked_kind,
            num_residues=len(row.residue_positions),
        )

    def _pieces(self, epoch: int, sequence_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each sequence is read in the corpus and how many residues of it, too long ones being cropped."""
        lengths = self.corpus.lengths[sequence_ids].astype(np.int64)
        starts = self.corpus.offsets[sequence_ids].astype(np.int64)
        room = self.max_sequence_length - self.corpus.vocabulary.num_boundary_tokens
        too_long = np.flatnonzero(lengths > room)
        if len(too_long):
            if self.by_content:
                whole = np.concatenate([self.corpus.sequence(int(index)) for index in sequence_ids[too_long]])
                crop_keys = content_keys(whole, lengths[too_long])
            else:
                crop_keys = keys(key(_CROP, self.seed, epoch), sequence_ids[too_long])
            draws = uniform_bits(crop_keys, np.zeros(len(too_long), dtype=np.int64))
            starts[too_long] += below(draws, lengths[too_long] - room + 1)
            lengths[too_long] = room
        return starts, lengths


class TrainingStream:
    """The endless stream of training rows: epoch after epoch, every sequence once in each, in new rows each time."""

    def __init__(
        self,
        corpus: Corpus,
        row_tokens: int,
        max_sequence_length: int,
        masking: MaskingConfig,
        masked_capacity: int,
        seed: int,
    ) -> None:
        """Take a corpus and the shape of a row. Raises InputError for lengths that do not fit."""
        self.builder = RowBuilder(
            corpus, row_tokens, max_sequence_length, masking, masked_capacity, seed, by_content=False
        )
        self._plans: dict[int, PackingPlan] = {}
        self.plan(0)

    def plan(self, epoch: int) -> PackingPlan:
        """Return the packing of an epoch; the two asked for last are kept."""
        plan = self._plans.pop(epoch, None) or _plan(self.builder, self.builder.seed, epoch)
        self._plans[epoch] = plan
        if len(self._plans) > _NUM_PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        return plan

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch; epochs may differ by a few."""
        return self.plan(epoch).num_rows

    def row(self, epoch: int, index: int) -> PackedRow:
        """Return row ``index`` of an epoch: a pure function of the stream's arguments and these two."""
        return self.builder.build(epoch, self.plan(epoch).row(index))

    def advance(self, position: StreamPosition, num_rows: int) -> StreamPosition:
        """Return the position ``num_rows`` further on. Raises InputError for a position outside of this corpus."""
        epoch, row = position.epoch, position.row
        if row >= self.num_rows(epoch):
            raise InputError(
                f"the data position is row {row} of epoch {epoch}, which has {self.num_rows(epoch)} rows here: "
                "resume with the corpus and the row shape that the run was started with"
            )
        row += num_rows
        while row >= self.num_rows(epoch):
            row -= self.num_rows(epoch)
            epoch += 1
        return StreamPosition(epoch, row)

    def rows_of_step(
        self, position: StreamPosition, global_batch_rows: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[tuple[int, int]]:
        """Return (epoch, row) of each row that a rank reads of the global batch at ``position``.

        Row j of the batch goes to rank j % data_parallel_size, so that the batch is the same rows for any size. Raises
        InputError when the batch cannot be dealt evenly.
        """
        _check_even(global_batch_rows, data_parallel_size)
        at = self.advance(position, data_parallel_rank)
        rows = [(at.epoch, at.row)]
        for _ in range(global_batch_rows // data_parallel_size - 1):
            at = self.advance(at, data_parallel_size)
            rows.append((at.epoch, at.row))
        return rows


class ValidationStream:
    """A fixed list of rows whose crops and masks depend on each sequence alone, so that losses compare between runs.

    ``max_rows`` keeps only that many rows (0: all), which are a random sample, since rows stand in random order.
    """

    def __init__(
        self,
        corpus: Corpus,
        row_tokens: int,
        max_sequence_length: int,
        masking: MaskingConfig,
        masked_capacity: int,
        max_rows: int = 0,
    ) -> None:
        """Take a corpus and the shape of a row. Raises InputError for lengths that do not fit."""
        self.builder = RowBuilder(corpus, row_tokens, max_sequence_length, masking, masked_capacity, 0, by_content=True)
        self._plan = _plan(self.builder, 0, 0)
        self.num_rows = min(max_rows or self._plan.num_rows, self._plan.num_rows)

    def row(self, index: int) -> PackedRow:
        """Return row ``index``."""
        return self.builder.build(0, self._plan.row(index))

    def num_batches(self, batch_rows: int) -> int:
        """Return how many batches of ``batch_rows`` rows hold all rows, the last one filled with blank rows."""
        return -(-self.num_rows // batch_rows)

    def sequences_of_batch(
        self, batch: int, batch_rows: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[NDArray[np.int64]]:
        """Return the sequence numbers of each row that a rank reads of a batch, none for a blank row.

        Every rank gets as many rows as the others. Raises InputError when the batch cannot be dealt evenly.
        """
        _check_even(batch_rows, data_parallel_size)
        rows = range(batch * batch_rows + data_parallel_rank, (batch + 1) * batch_rows, data_parallel_size)
        blank = np.empty(0, dtype=np.int64)
        return [self._plan.row(row) if row < self.num_rows else blank for row in rows]


@dataclass(frozen=True)
class StepRows:
    """What one data-parallel rank reads at one step: its rows, and the stream's position after the step."""

    step: int
    rows: list[PackedRow]
    position_after: StreamPosition


@dataclass(frozen=True)
class _Request:
    """What a loader process is asked for: rows by (epoch, sequence numbers), so that no loader process plans epochs."""

    step: int
    rows: list[tuple[int, NDArray[np.int64]]]
    position_after: StreamPosition


class _RequestedRows(Dataset[StepRows | MegaprotError]):
    """A data set whose indices are requests, for torch's DataLoader.

    Our own errors are returned: torch would put a traceback into the text of those raised in a loader process.
    """

    def __init__(self, builder: RowBuilder) -> None:
        self.builder = builder

    def __getitem__(self, request: _Request) -> StepRows | MegaprotError:
        """Build the rows of one request."""
        try:
            rows = [self.builder.build(epoch, sequence_ids) for epoch, sequence_ids in request.rows]
        except MegaprotError as error:
            return error
        return StepRows(request.step, rows, request.position_after)


def iterate_steps(
    stream: TrainingStream,
    position: StreamPosition,
    steps: Iterable[int],
    batch_rows_at: Callable[[int], int],
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
) -> Iterator[StepRows]:
    """Yield the rows of this rank for each of ``steps``, the first one reading at ``position``.

    ``batch_rows_at(step)`` is the number of rows of the global batch. ``num_workers`` processes build rows ahead of
    their use; 0 builds them here. Raises InputError for an uneven batch and RunError when a loader process dies.
    """

    def requests() -> Iterator[_Request]:
        at = position
        for step in steps:
            batch_rows = batch_rows_at(step)
            places = stream.rows_of_step(at, batch_rows, data_parallel_rank, data_parallel_size)
            rows = [(epoch, stream.plan(epoch).row(index)) for epoch, index in places]
            at = stream.advance(at, batch_rows)
            yield _Request(step, rows, at)

    return _load(stream.builder, requests(), num_workers)


def iterate_validation(
    stream: ValidationStream, batch_rows: int, data_parallel_rank: int, data_parallel_size: int, num_workers: int
) -> Iterator[list[PackedRow]]:
    """Yield the rows of this rank for each batch of ``batch_rows`` rows over all ranks; the last ones may be blank.

    Raises as ``iterate_steps``.
    """
    requests = (
        _Request(
            batch,
            [(0, ids) for ids in stream.sequences_of_batch(batch, batch_rows, data_parallel_rank, data_parallel_size)],
            StreamPosition(),
        )
        for batch in range(stream.num_batches(batch_rows))
    )
    return (step_rows.rows for step_rows in _load(stream.builder, requests, num_workers))


def _load(builder: RowBuilder, requests: Iterator[_Request], num_workers: int) -> Iterator[StepRows]:
    """Yield what is requested, in order, built by ``num_workers`` processes."""
    options: dict[str, Any] = {}
    if num_workers > 0:
        # Started afresh and not forked: NCCL and InfiniBand do not survive a fork, and the memory map is opened anew.
        options = {
            "multiprocessing_context": "spawn",
            "prefetch_factor": _STEPS_READ_AHEAD,
            "worker_init_fn": _live_and_die_with_the_parent,
        }
    loader: DataLoader[StepRows | MegaprotError] = DataLoader(
        _RequestedRows(builder),
        batch_size=None,
        sampler=requests,  # type: ignore[arg-type]  # torch only iterates over it
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=torch.Generator(),  # else starting a loader moves torch's global generator, and dropout with it
        **options,
    )
    try:
        for step_rows in loader:
            if isinstance(step_rows, MegaprotError):
                raise step_rows
            yield step_rows
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"a data loader process died ({str(error).splitlines()[0].rstrip('. ')}): give the machine more memory "
            "or lower data.num_workers"
        ) from error


def _as_it_is(step_rows: Any) -> Any:
    """Return what was built, in place of torch's conversion to tensors."""
    return step_rows


def _live_and_die_with_the_parent(worker: int) -> None:
    """Let a loader process outlive Ctrl-C and Slurm's warning, which the training process answers, but not its parent.

    torch's own watch starts too late for a parent that is killed while its loaders start: they would stay for ever.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):  # SIGTERM is how the parent itself ends them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_after_the_parent, daemon=True).start()


def _exit_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _plan(builder: RowBuilder, seed: int, epoch: int) -> PackingPlan:
    return plan_epoch(
        builder.corpus.lengths,
        builder.row_tokens,
        builder.max_sequence_length,
        builder.corpus.vocabulary.num_boundary_tokens,
        seed,
        epoch,
    )


def _check_even(batch_rows: int, data_parallel_size: int) -> None:
    if batch_rows <= 0 or batch_rows % data_parallel_size:
        raise InputError(
            f"a batch of {batch_rows} rows cannot be dealt evenly to {data_parallel_size} data-parallel rank(s): "
            f"make train.global_batch_rows and its ramp-up multiples of {data_parallel_size}"
        )
