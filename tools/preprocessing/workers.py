"""Units shared among worker processes: none outlives this one, and what one ends with is told in one sentence."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaprot.common.errors import InputError, RunError
from megaprot.tools.preprocessing.parts import PartMaker, PartSettings
from megaprot.tools.preprocessing.units import STANDARD_INPUT, Unit, num_bytes

PROGRESS_SECONDS = 0.2


def write_parts(units: list[Unit], settings: PartSettings, folder: Path, num_workers: int) -> None:
    """Write the part of each unit into ``folder``, in this process if ``num_workers`` is 1 or there is one unit.

    Raises:
        InputError: for wrong input.
        OSError: where a part could not be written.
        RunError: where a worker was killed.
    """
    sizes = {unit.path: num_bytes(unit.path) for unit in units}
    total = None if STANDARD_INPUT in sizes else _num_bytes_of(units)
    with tqdm(total=total, desc="preprocess", unit="B", unit_scale=True, disable=None) as progress:
        all_here = num_workers == 1 or len(units) == 1
        here = [unit for unit in units if all_here or unit.path == STANDARD_INPUT]
        there = [unit for unit in units if not all_here and unit.path != STANDARD_INPUT]
        maker = PartMaker(settings)
        for unit in here:
            start = int(progress.n)
            maker.write(unit, folder / unit.folder_name, partial(_show, progress, start))
        if there:
            _write_in_workers(there, settings, folder, min(num_workers, len(there)), progress)


def _num_bytes_of(units: list[Unit]) -> int:
    """Return the bytes that the progress bar counts: those of units that read sequences."""
    ranges = [unit.byte_range or (0, num_bytes(unit.path)) for unit in units if not unit.is_checksum]
    return sum(end - start for start, end in ranges)


def _show(progress: Any, num_before: int, num_read: int) -> None:
    progress.update(num_before + num_read - progress.n)


def _write_in_workers(units: list[Unit], settings: PartSettings, folder: Path, num_workers: int, progress: Any) -> None:
    context = multiprocessing.get_context("spawn")  # forked processes inherit locks that a thread may hold
    next_unit = context.Value("q", 0)
    num_read = context.RawArray("q", len(units))  # each place is written by one worker only
    workers = []
    pipes: list[Any] = []
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (units, settings, folder, next_unit, num_read, theirs)
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        already_read = progress.n
        while pipes:
            for pipe in wait(pipes, timeout=PROGRESS_SECONDS):
                _hear(pipe)
                pipes.remove(pipe)
            _show(progress, already_read, sum(num_read))
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def _hear(pipe: Any) -> None:
    """Raise what a worker ended with, if badly."""
    try:
        error = pipe.recv()
    except EOFError:
        raise RunError(
            "a worker process died, perhaps for want of memory: use fewer --workers, and run the command again."
        ) from None
    if error is not None:
        raise error


def _work(
    units: Sequence[Unit], settings: PartSettings, folder: Path, next_unit: Any, num_read: Any, pipe: Connection
) -> None:
    """Write parts of units until there are no more; say at the end that all is well, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes: the parent ends us
    threading.Thread(target=_exit_after_the_parent, daemon=True).start()
    maker = PartMaker(settings)
    try:
        while True:
            with next_unit.get_lock():
                place = next_unit.value
                next_unit.value += 1
            if place >= len(units):
                break

            def note(read: int, place: int = place) -> None:
                num_read[place] = read

            maker.write(units[place], folder / units[place].folder_name, note)
        pipe.send(None)
    except (InputError, RunError, OSError) as error:
        pipe.send(error)


def _exit_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


@contextmanager
def sigterm_cleans_up() -> Iterator[None]:
    """Let SIGTERM end the block as an exception would, so that temporary folders and workers go; exit status 143."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
