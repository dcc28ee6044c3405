"""One run a folder: a lock on a file in it, which the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megaprot.common.errors import RunError

LOCK = ".lock"
# A killed process may hang in its last write for a while; a file server keeps the lock of a lost node for about 90 s.
_PATIENCE_SECONDS = 120.0
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be, so that no other run writes to it; one that is ending is waited for.

    POSIX record locks: they hold on network file systems too, and processes forked from this one do not keep them.

    Raises:
        RunError: Another run holds the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); free the disk or name another.") from error
    with stream:
        _take(stream, folder)
        yield


def _take(stream: TextIO, folder: Path) -> None:
    """Lock the file and write into it who holds it."""
    started = time.monotonic()
    is_waiting = False
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _UNKNOWN:
                print(f"{folder} knows no locks ({error.strerror}); see that no other run writes to it", flush=True)
                return
            if error.errno not in _TAKEN:
                raise
        stream.seek(0)
        found = f"{folder} is held by another run or an earlier start ({stream.read().strip() or 'unknown'})"
        if time.monotonic() - started > _PATIENCE_SECONDS:
            raise RunError(
                f"{found}; stop that one or name another folder, or if there is none remove {folder / LOCK}."
            )
        if not is_waiting:
            print(f"{found}; waiting for its end", flush=True)
        is_waiting = True
        time.sleep(1.0)
    job = os.environ.get("SLURM_JOB_ID")
    stream.truncate(0)
    stream.write(f"{socket.gethostname()} process {os.getpid()}" + (f" of job {job}\n" if job else "\n"))
    stream.flush()
