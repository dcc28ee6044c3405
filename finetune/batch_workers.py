"""Run a function over batches with all cores of a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@contextmanager
def batch_workers(device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give a ``map`` over batches: on a CPU a thread a core, each batch in one of them; on a GPU one after another.

    One thread a batch leaves no core waiting for another inside an operation, which costs more than it saves for the
    small matrices of a batch. The number of cores is what torch was told (OMP_NUM_THREADS, torchrun).
    """
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        yield map
        return
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield partial(_map_ahead, pool, 2 * num_threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _map_ahead(
    pool: ThreadPoolExecutor, num_ahead: int, function: Callable[[Batch], Result], batches: Sequence[Batch]
) -> Iterator[Result]:
    """Do what ``pool.map`` does with at most ``num_ahead`` results waiting, so that memory stays bounded."""
    running = [pool.submit(function, batch) for batch in batches[:num_ahead]]
    for place in range(len(batches)):
        yield running[place % num_ahead].result()
        if place + num_ahead < len(batches):
            running[place % num_ahead] = pool.submit(function, batches[place + num_ahead])
