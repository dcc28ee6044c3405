"""A run that a launcher may watch: its folder held, signs of life, one message, from the rank that has the cause."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megaprot.common import heartbeat
from megaprot.common.errors import InputError, LostPeersError, RunError
from megaprot.common.run_lock import held

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextmanager
def watched(folder: str) -> Iterator[None]:
    """Hold a run's folder and show signs of life while it lasts, and end it in the way that its launcher understands.

    What ends on purpose (wrong input, a run that gives up, a disk that cannot be written) is marked as such, so that it
    is not started again. A process that only lost another says nothing: the launcher names the cause.

    Args:
        folder: Of the run, held against other runs; named where a file that cannot be written has no name.

    Raises:
        RunError: Another run holds the folder; or in place of an OSError of a full or closed disk.
    """
    is_watched = heartbeat.start()
    # One rank holds the folder for all: the others end with it.
    holding = held(Path(folder)) if os.environ.get("RANK", "0") == "0" else nullcontext()
    try:
        with holding:
            yield
    except LostPeersError:
        if is_watched:
            raise SystemExit(LostPeersError.exit_status) from None
        raise
    except (InputError, RunError):
        heartbeat.mark(heartbeat.GAVE_UP)
        raise
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        heartbeat.mark(heartbeat.GAVE_UP)
        named = error.filename or folder
        raise RunError(f"{named} cannot be written ({error.strerror}); free the disk and start again.") from error
