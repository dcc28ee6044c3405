"""Writing so that nothing half-written ever looks whole, and checksums.

A file or folder is written under a temporary name beside its final one, synced to disk, then renamed: POSIX makes the
rename atomic, and syncing the parent folder makes it last through a power cut.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megaprot.common.errors import InputError

BLOCK_BYTES = 1 << 22
"""Bytes of a large file that are read at once."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new names, renames) last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Give a binary stream whose content appears as ``path`` when the block ends well, and not at all otherwise.

    The temporary name is fixed (``.<name>.partial``), so that what a killed process left is overwritten by the next.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON with a final newline, through :func:`atomic_write`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as stream:
        stream.write(text.encode() + b"\n")


def publish_folder(partial: Path, final: Path) -> None:
    """Sync every file and folder below ``partial``, then rename it to ``final``, which must be absent or empty.

    Raises:
        OSError: where ``final`` has content or the rename is refused; ``partial`` is then still there.
    """
    for folder, _, names in os.walk(partial):
        for name in names:
            with open(Path(folder) / name, "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(folder))
    os.rename(partial, final)
    sync_folder(final.parent)


@contextmanager
def folder_written_whole(final: Path) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes ``final`` when the block ends well and vanishes otherwise.

    The sibling's name holds the host and the process, ``.<name>.partial-<host>-<process>``: leftovers of processes of
    this host that have ended are removed first, those of running ones are let alone.

    Raises:
        InputError: where ``final`` exists with content, is a file, or its parent cannot be written to.
    """
    final = Path(os.path.abspath(final))
    require_absent_or_empty(final)
    partial = final.with_name(f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{final.parent}: cannot be written to ({error.strerror}): choose another folder.") from None
    try:
        yield partial
        require_absent_or_empty(final)  # another process may have been faster
        publish_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_absent_or_empty(folder: Path) -> None:
    """Raise InputError where ``folder`` exists and is anything but an empty folder."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise InputError(f"{folder}: already has content: remove it or name another output folder.")
    elif folder.exists():
        raise InputError(f"{folder}: is a file, not a folder: name another output folder.")


def _remove_leftovers(final: Path) -> None:
    start = f".{final.name}.partial-{socket.gethostname()}-"
    for entry in final.parent.iterdir():
        process = entry.name.removeprefix(start)
        if entry.name.startswith(start) and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(entry)


def _is_running(process: int) -> bool:
    if process == os.getpid():  # the number was given out again, to us: what bears it is not ours
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
