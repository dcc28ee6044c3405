"""A run that a launcher may watch: signs of life while it lasts, and one message, from the rank that has the cause."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from megaprot.common import heartbeat
from megaprot.common.errors import InputError, LostPeersError, RunError

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextmanager
def watched(folder: str) -> Iterator[None]:
    """Show signs of life during a run, and end it in the way that its launcher understands.

    What ends on purpose (wrong input, a run that gives up, a disk that cannot be written) is marked as such, so that it
    is not started again. A process that only lost another says nothing: the launcher names the cause.

    Args:
        folder: Of the run; named where a file that cannot be written has no name.

    Raises:
        RunError: In place of an OSError of a full or closed disk.
    """
    is_watched = heartbeat.start()
    try:
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
