"""Work of many small pieces over the threads torch may use, a piece at a time on one of them.

torch shares out each of its operators, which does not pay for operators of microseconds: here a thread does all that a
piece needs, as long as there are pieces left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Result = TypeVar("Result")


def bits(states: Tensor) -> NDArray[np.uint16]:
    """Return a bf16 tensor's memory as numpy's type of the same width, not copied."""
    return states.detach().view(torch.uint16).numpy()


@cache
def _helpers(number: int) -> ThreadPoolExecutor:
    # The number of threads is each thread's own setting in OpenMP.
    return ThreadPoolExecutor(number, "megaprot-cpu", initializer=torch.set_num_threads, initargs=(1,))


def on_all_threads(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """Do all jobs on ``torch.get_num_threads()`` threads, this one among them; return their results in order."""
    num_threads = min(torch.get_num_threads(), len(jobs))
    if num_threads < 2:
        return [job() for job in jobs]
    results: dict[int, Result] = {}
    numbers = iter(range(len(jobs)))

    def work() -> None:
        for number in numbers:  # an iterator is safe to share: one thread at a time runs Python
            results[number] = jobs[number]()

    before = torch.get_num_threads()
    helpers = [_helpers(before - 1).submit(work) for _ in range(num_threads - 1)]
    torch.set_num_threads(1)
    try:
        work()
    finally:
        torch.set_num_threads(before)
        for helper in helpers:
            helper.result()
    return [results[number] for number in range(len(jobs))]
