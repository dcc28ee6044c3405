"""The run folder: can it be written to, renamed in and locked, and how fast is it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from pathlib import Path

from megaprot.tools.diagnosis.finding import Finding

_BLOCK_BYTES = 1 << 20
_CLOCK_SECONDS = 1.0


def _probe(folder: Path, what: str) -> Path:
    """Return a name nobody else uses."""
    return folder / f".doctor-{what}-{socket.gethostname()}-{os.getpid()}"


def check_writable(folder: Path) -> Finding:
    """Make the folder, write a file with fsync and rename it over another, as a save does."""
    first, second = _probe(folder, "new"), _probe(folder, "old")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (second, first):
            with open(path, "wb") as stream:
                stream.write(path.name.encode())
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(first, second)
        held = second.read_bytes()
        second.unlink()
    except OSError as error:
        remedy = "name another --run_dir, or have it mounted writable for you on every node."
        return Finding("run folder", "failed", f"{folder} cannot be written to ({error.strerror})", remedy)
    if held != first.name.encode():
        remedy = "put run folders on another file system: saves rely on atomic renames."
        return Finding("run folder", "failed", f"a rename in {folder} left the old content", remedy)
    return Finding("run folder", "ok", f"{folder}: written, synced, renamed")


def check_lock(folder: Path) -> Finding:
    """Take an exclusive lock twice: the second must be refused."""
    path = _probe(folder, "lock")
    try:
        with open(path, "wb") as first, open(path, "wb") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Finding("file locks", "ok", "exclusive locks are kept")
        remedy = "mount the file system with locks (Lustre: -o flock)."
        return Finding("file locks", "warning", "a lock was given twice", remedy)
    except OSError as error:
        remedy = "mount the file system with locks (Lustre: -o flock)."
        return Finding("file locks", "warning", f"no lock could be taken ({error.strerror})", remedy)
    finally:
        path.unlink(missing_ok=True)


def check_disk_speed(folder: Path, size_mb: int, least_mb_per_second: float) -> Finding:
    """Write ``size_mb`` MiB with fsync at the end; checkpoints wait for this."""
    path, block = _probe(folder, "speed"), os.urandom(_BLOCK_BYTES)
    try:
        if shutil.disk_usage(folder).free < 2 * size_mb * _BLOCK_BYTES:
            remedy = "free space there, or name another --run_dir."
            return Finding("disk speed", "failed", f"less than {2 * size_mb} MiB are free in {folder}", remedy)
        started = time.perf_counter()
        with open(path, "wb") as stream:
            for _ in range(size_mb):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        rate = size_mb / (time.perf_counter() - started)
    except OSError as error:
        return Finding("disk speed", "failed", f"writing {size_mb} MiB failed ({error.strerror})", "mend the disk.")
    finally:
        path.unlink(missing_ok=True)
    if rate < least_mb_per_second:
        remedy = "name a --run_dir on a faster file system, or save less often (train.save_interval)."
        detail = f"slow: {size_mb} MiB written and synced, at least {least_mb_per_second:g} MiB/s wanted"
        return Finding("disk speed", "warning", detail, remedy, rate, "MiB/s")
    return Finding("disk speed", "ok", f"{size_mb} MiB written and synced", "", rate, "MiB/s")


def check_file_clock(folder: Path) -> Finding:
    """Compare this machine's clock with the file server's, by the time of a new file."""
    path = _probe(folder, "clock")
    before = time.time()
    path.touch()
    after, stamped = time.time(), path.stat().st_mtime
    path.unlink()
    skew = max(before - stamped, stamped - after, 0.0)
    if skew > _CLOCK_SECONDS:
        remedy = "let chrony or ntpd set the clocks of this node and of the file server."
        return Finding("file clock", "warning", "the file server's clock is another", remedy, skew, "s")
    return Finding("file clock", "ok", "agrees with the file server", "", skew, "s")


def check_storage(folder: Path, size_mb: int, least_mb_per_second: float) -> list[Finding]:
    """Return all of this module's findings; the first alone where the folder cannot be written to."""
    writable = check_writable(folder)
    if writable.status == "failed":
        return [writable]
    speed = check_disk_speed(folder, size_mb, least_mb_per_second)
    return [writable, check_lock(folder), speed, check_file_clock(folder)]
