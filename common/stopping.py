"""A run that is asked to end: it saves after the step it is in, and leaves a marker for whoever starts it again."""

import signal
from pathlib import Path
from types import FrameType

from megaprot.common.files import atomic_write

REQUEUE_MARKER = "REQUEUE"
"""In a run's folder: it was asked to stop, has saved, and goes on when the same command starts again."""


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, so that a run saves and ends after the step it is in."""

    def __init__(self) -> None:
        self.is_made = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_made = True


def leave_marker(folder: Path, step: int) -> None:
    """Write the marker into a run's folder; ``step`` is the last one taken."""
    with atomic_write(folder / REQUEUE_MARKER) as stream:
        stream.write(f"step {step}\n".encode())


def remove_marker(folder: Path) -> None:
    """Remove the marker, if there is one: the run goes on."""
    (folder / REQUEUE_MARKER).unlink(missing_ok=True)
