"""Shards of a save are written by the rank itself, at once or in a thread.

megatron-core forks a writer for each save and keeps a manager process for its results. A signal sent to every process
of a job, or the kernel's want of memory, kills one of them, and the save then waits for ever; a rank that is killed
leaves the manager behind. One writer a rank gains nothing by being another process.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

_Writer = filesystem_async.FileSystemWriterAsync


class _Nobody:
    """Where a writer process would say that it is done."""

    def get(self) -> None:
        """Take nothing."""

    def task_done(self) -> None:
        """Tell nobody."""


def _write(transform_list: Any, use_msc: bool, rank: int, write_buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Write every bucket, one file each, and put {number: what was written} or the first exception into ``results``."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(write_buckets):
        said: queue.Queue[Any] = queue.Queue()
        # Without its decorator, which switches garbage collection off: this process goes on training.
        write = _Writer.write_preloaded_data.__wrapped__
        write(transform_list, number, bucket, said, _Nobody(), use_fsync=True, use_msc=use_msc)
        outcome = said.get_nowait()[1]
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[number] = outcome
    results.put(written)


@contextmanager
def no_writer_processes() -> Iterator[None]:
    """Let megatron-core's saves inside write in this process, and collect what they write in a plain queue."""
    before = _Writer.write_preloaded_data_multiproc, filesystem_async._results_queue
    _Writer.write_preloaded_data_multiproc = staticmethod(_write)
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        _Writer.write_preloaded_data_multiproc = staticmethod(before[0])
        filesystem_async._results_queue = before[1]


def in_host_memory(request: AsyncRequest, as_copies: bool) -> Callable[[], None]:
    """Bring what a rank is to write into host memory, and return what writes it.

    Args:
        request: What ``dist_checkpointing.save`` has planned inside :func:`no_writer_processes`.
        as_copies: Copy tensors that are there already, because training goes on while they are written.
    """
    write = request.async_fn
    if write is None:
        return lambda: None
    rank, given, results = request.async_fn_args
    loaded = request.preload_fn()
    for (_, _, (_, own)), (_, _, (_, tensors)) in zip(given, loaded, strict=True):
        if as_copies:
            tensors[:] = [
                (item, tensor.clone() if was.is_cpu else tensor)
                for (item, tensor), (_, was) in zip(tensors, own, strict=True)
            ]
        own[:] = tensors  # the request lives until the save is finished, and would keep what it was given
    return lambda: write(rank, loaded, results)
