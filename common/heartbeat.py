"""Signs of life for whoever started this process: how far it is and that it still runs.

``megaprot launch`` names a folder in MEGAPROT_HEARTBEAT_FOLDER; without it all of this does nothing. There each rank
keeps one line, ``BEAT PROGRESS STEP PHASE``: BEAT grows each second from a thread of its own, PROGRESS with every mark.
A rank whose BEAT stands still is stopped or gone; one whose PROGRESS stands still waits for something. SIGUSR2 makes it
write the stacks of its threads beside the line.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path

FOLDER_VARIABLE = "MEGAPROT_HEARTBEAT_FOLDER"
GAVE_UP = "gave up"
"""The phase of a process that ends on purpose, with a message: starting it again would end the same."""

_LINE_BYTES = 80
_SECONDS = 1.0


class _Heart:
    """The line of this process; a line of fixed width, written in one piece, is never read half-written."""

    def __init__(self, folder: Path, rank: str) -> None:
        self.beats = self.progress = self.step = 0
        self.phase = "starting"
        self.descriptor = os.open(folder / f"rank_{rank}", os.O_CREAT | os.O_WRONLY, 0o644)
        self.stacks = open(folder / f"stacks_{rank}.txt", "w")  # noqa: SIM115  # open as long as the process
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=True)
        self.write()
        threading.Thread(target=self.beat, daemon=True).start()

    def write(self) -> None:
        """Write the line as things are now."""
        line = f"{self.beats} {self.progress} {self.step} {self.phase}".ljust(_LINE_BYTES - 1)[: _LINE_BYTES - 1]
        os.pwrite(self.descriptor, line.encode() + b"\n", 0)

    def beat(self) -> None:
        """Write it again each second, until the process ends."""
        while True:
            time.sleep(_SECONDS)
            self.beats += 1
            self.write()


_hearts: list[_Heart] = []  # of this process: one, or none without a launcher


def start() -> bool:
    """Begin to show signs of life where a launcher asks for them, and return whether it does; once is enough."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and not _hearts:
        _hearts.append(_Heart(Path(folder), os.environ.get("RANK", "0")))
    return bool(folder)


def mark(phase: str, step: int = -1) -> None:
    """Say what this process begins to do, and how many optimizer steps are behind it (-1: as before)."""
    for heart in _hearts:
        heart.phase = phase
        heart.step = heart.step if step < 0 else step
    progress()


def progress() -> None:
    """Say that the present phase goes on: a batch of a long validation is done, say."""
    for heart in _hearts:
        heart.progress += 1
        heart.write()
