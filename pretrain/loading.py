"""Rows ahead of their use: torch's DataLoader over requests, in this process or in loader processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import context, resource_tracker
from multiprocessing.popen_spawn_posix import Popen
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from megaprot.common.errors import MegaprotError, RunError
from megaprot.common.packing import PackedRow
from megaprot.pretrain.rows import RowBuilder
from megaprot.pretrain.stream import StreamPosition, TrainingStream, ValidationStream

_STEPS_READ_AHEAD = 2  # by each worker


@dataclass(frozen=True)
class StepRows:
    """What one data-parallel rank reads at one step: its rows, and the stream's position after the step."""

    step: int
    rows: list[PackedRow]
    position_after: StreamPosition


@dataclass(frozen=True)
class _Request:
    """What a loader process is asked for: rows by (corpus, epoch, sequence numbers), so that none plans epochs."""

    step: int
    rows: list[tuple[int, int, NDArray[np.int64]]]
    position_after: StreamPosition


class _RequestedRows(Dataset[StepRows | MegaprotError]):
    """A data set whose indices are requests, for torch's DataLoader.

    Our own errors are returned: torch would put a traceback into the text of those raised in a loader process.
    """

    def __init__(self, builders: list[RowBuilder]) -> None:
        self.builders = builders

    def __getitem__(self, request: _Request) -> StepRows | MegaprotError:
        """Build the rows of one request."""
        try:
            rows = [self.builders[corpus].build(epoch, sequence_ids) for corpus, epoch, sequence_ids in request.rows]
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
    their use; 0 builds them here. Raises RunError when a loader process dies.
    """

    def requests() -> Iterator[_Request]:
        at = position
        for step in steps:
            batch_rows = batch_rows_at(step)
            places = stream.rows_of_step(at, batch_rows, data_parallel_rank, data_parallel_size)
            rows = [(corpus, epoch, stream.sequences(corpus, epoch, index)) for corpus, epoch, index in places]
            at = stream.advance(at, batch_rows)
            yield _Request(step, rows, at)

    return _load(stream.builders, requests(), num_workers)


def iterate_validation(
    stream: ValidationStream, batch_rows: int, data_parallel_rank: int, data_parallel_size: int, num_workers: int
) -> Iterator[list[PackedRow]]:
    """Yield the rows of this rank for each batch of ``batch_rows`` rows over all ranks; the last ones may be blank.

    Raises as ``iterate_steps``.
    """
    requests = (
        _Request(
            batch,
            [
                (corpus, 0, sequence_ids)
                for corpus, sequence_ids in stream.rows_of_batch(
                    batch, batch_rows, data_parallel_rank, data_parallel_size
                )
            ],
            StreamPosition(),
        )
        for batch in range(stream.num_batches(batch_rows))
    )
    return (step_rows.rows for step_rows in _load(stream.builders, requests, num_workers))


def _load(builders: list[RowBuilder], requests: Iterator[_Request], num_workers: int) -> Iterator[StepRows]:
    """Yield what is requested, in order, built by ``num_workers`` processes."""
    options: dict[str, Any] = {}
    if num_workers > 0:
        # Started afresh and not forked: NCCL and InfiniBand do not survive a fork, and the memory map is opened anew.
        options = {
            "multiprocessing_context": _LoaderContext(),
            "prefetch_factor": _STEPS_READ_AHEAD,
            "worker_init_fn": _die_with_the_parent,
        }
    loader: DataLoader[StepRows | MegaprotError] = DataLoader(
        _RequestedRows(builders),
        batch_size=None,
        sampler=requests,  # type: ignore[arg-type]  # torch only iterates over it
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=torch.Generator(),  # else starting a loader moves torch's global generator, and dropout with it
        **options,
    )
    with _signals_held_back():
        rows = iter(loader)
    try:
        for step_rows in rows:
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


class _LoaderPopen(Popen):
    """A started loader process. multiprocessing ends its daemons by SIGTERM and waits for them; these never see one."""

    def terminate(self) -> None:
        """End the process by SIGKILL: it holds nothing that must be put in order."""
        self.kill()


class _LoaderProcess(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:  # multiprocessing's name
        return _LoaderPopen(process_obj)


class _LoaderContext(context.SpawnContext):
    Process = _LoaderProcess


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start processes inside that no signal meant for the training process can end.

    SIGTERM, Ctrl-C and Slurm's warning often reach every process of a job; a loader's death would end the run without a
    save. A process inherits what its parent blocks, so loaders are deaf from their first instruction on, while signals
    to the parent only wait for the end of the block.
    """
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        resource_tracker.ensure_running()  # started by the first process otherwise, and that unblocks two of them
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_the_parent(worker: int) -> None:
    """Let a loader process end when the training process does.

    torch's own watch starts too late for a parent that is killed while its loaders start: they would stay for ever.
    """
    threading.Thread(target=_exit_after_the_parent, daemon=True).start()


def _exit_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
