"""Where sequences come from: a file or standard input as one stream of decompressed bytes, counted and hashed."""

import gzip
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isal import igzip, isal_zlib  # inflates three times as fast as the standard library

from megaprot.common.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to be skipped (pzstd)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 17  # small, since what is inflated from one piece is held as a whole


class Source:
    """One input: a file, or standard input where ``path`` is ``-``.

    ``num_bytes`` and ``sha256`` describe the stored (compressed) bytes read so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.name = "standard input" if self.path == "-" else self.path
        self._stored = _HashedStream(io.BytesIO())
        self._looked_at: io.BufferedReader | None = None  # standard input, which cannot be opened twice

    @property
    def num_bytes(self) -> int:
        """Return the number of stored bytes read so far."""
        return self._stored.num_bytes

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the stored bytes read so far, in hexadecimal."""
        return self._stored.digest.hexdigest()

    def content(self) -> io.BufferedReader:
        """Return the decompressed content from its beginning; the caller closes it.

        Raises:
            InputError: here or when it is read, where the source is missing, unreadable, truncated or damaged.
        """
        if self._looked_at is not None:
            stream, self._looked_at = self._looked_at, None
            return stream
        self._stored = _HashedStream(self.opened())
        return io.BufferedReader(_GuardedStream(self._stored, self.name), _BUFFER_BYTES)

    def plain_content(self, start: int) -> io.BufferedReader:
        """Return the stored bytes of a file from byte ``start`` on, neither hashed nor counted nor decompressed."""
        raw = self.opened()
        raw.seek(start)
        return io.BufferedReader(_GuardedStream(raw, self.name, is_plain=True), _BUFFER_BYTES)

    def count_lines(self, end: int) -> int:
        """Return the number of line ends in the first ``end`` stored bytes of a file."""
        num_lines = 0
        with self.plain_content(0) as stream:
            while end > 0 and (block := stream.read(min(_BUFFER_BYTES, end))):
                num_lines += block.count(b"\n")
                end -= len(block)
        return num_lines

    def head(self) -> bytes:
        """Return the first HEAD_BYTES of the content, which ``content`` still gives afterwards."""
        stream = self.content()
        head = stream.read(HEAD_BYTES)
        if self.path == "-":
            self._looked_at = io.BufferedReader(_RejoinedStream(head, stream), _BUFFER_BYTES)
        else:
            stream.close()
            self._stored = _HashedStream(io.BytesIO())
        return head

    def is_compressed(self) -> bool:
        """Tell whether the stored file, which must not be standard input, is gzip- or zstd-compressed."""
        with self.opened() as raw:
            return _is_gzip_or_zstd(raw.read(4))

    def opened(self) -> Any:
        """Return the stored bytes as an unbuffered stream; raises InputError where they cannot be opened."""
        if self.path == "-":
            if sys.stdin is None:
                raise InputError("standard input: is closed: pipe sequences into it, or name a file.")
            return sys.stdin.buffer
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise _unreadable(self.name, error) from None

    @contextmanager
    def passed_over(self, path: Path) -> Iterator[Callable[[float], None]]:
        """Count and hash the bytes of ``path`` for a format that a library reads by itself.

        Gives a function to call with the share that has been read, from 0 to 1; the rest is passed over at the end.
        """
        size = path.stat().st_size
        self._stored = stored = _HashedStream(open(path, "rb", buffering=0))  # noqa: SIM115 - closed below

        def pass_over(share: float) -> None:
            end = int(size * share)
            while stored.num_bytes < end and stored.read(min(_BUFFER_BYTES, end - stored.num_bytes)):
                pass

        try:
            yield pass_over
            pass_over(1.0)
        finally:
            stored.close()


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(f"{name}: cannot be read ({error.strerror or error}): give a readable file of sequences.")


class _ZstdDamage(ValueError):
    """A zstd-compressed stream that cannot be decompressed."""


_DAMAGE: tuple[Any, ...] = (gzip.BadGzipFile, zlib.error, isal_zlib.error, _ZstdDamage)


class _HashedStream(io.RawIOBase):
    """A raw stream that counts and hashes what passes, so that a source need not be read twice (or can be a pipe)."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        """Return True: it is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and count and hash what came; return how many bytes did."""
        num_read: int = self._raw.readinto(buffer)
        self.digest.update(buffer[:num_read])
        self.num_bytes += num_read
        return num_read

    def close(self) -> None:
        """Close what is underneath."""
        if not self.closed and self._raw is not getattr(sys.stdin, "buffer", None):
            self._raw.close()
        super().close()


class _RejoinedStream(io.RawIOBase):
    """A stream whose first bytes, ``head``, have been read already."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        """Return True: it is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, first what had been read already; return how many bytes came."""
        if not self._head:
            return int(self._rest.readinto(buffer))
        num_read = min(len(buffer), len(self._head))
        buffer[:num_read] = self._head[:num_read]
        self._head = self._head[num_read:]
        return num_read

    def close(self) -> None:
        """Close what is underneath."""
        if not self.closed:
            self._rest.close()
        super().close()


class _GuardedStream(io.RawIOBase):
    """The content of a stored stream, decompressed by what its first bytes say; every failure is an InputError.

    Opening is put off to the first read, so that a failure there is told in the same way.
    """

    def __init__(self, stored: Any, name: str, is_plain: bool = False) -> None:
        self._stored = stored
        self._name = name
        self._content: Any = stored if is_plain else None

    def readable(self) -> bool:
        """Return True: it is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read decompressed bytes into a buffer; return how many came, 0 at the end."""
        try:
            if self._content is None:
                self._content = _decompressed(self._stored)
            return int(self._content.readinto(buffer))
        except EOFError:
            raise InputError(f"{self._name}: the compressed file is truncated: copy or download it again.") from None
        except _DAMAGE as error:
            raise InputError(f"{self._name}: the compressed file is damaged ({error}): copy it again.") from None
        except OSError as error:
            raise _unreadable(self._name, error) from None

    def close(self) -> None:
        """Close what is underneath."""
        if not self.closed:
            self._stored.close()
        super().close()


def _decompressed(stored: _HashedStream) -> Any:
    magic = b""
    while len(magic) < 4 and (more := stored.read(4 - len(magic))):  # a pipe may give less than was asked for
        magic += more
    whole = _RejoinedStream(magic, stored)
    if magic.startswith(GZIP_MAGIC):
        return igzip.IGzipFile(fileobj=io.BufferedReader(whole, _BUFFER_BYTES))
    return _ZstdStream(whole) if _ZSTD_MAGIC.match(magic) else whole


def _is_gzip_or_zstd(head: bytes) -> bool:
    return head.startswith(GZIP_MAGIC) or bool(_ZSTD_MAGIC.match(head))


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames one after another; EOFError where the last is cut, which the library's reader hides."""

    def __init__(self, stored: Any) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(
                "a zstd-compressed file needs the package zstandard: pip install 'megaprot[data]'."
            ) from None
        self._library: Any = zstandard
        self._stored = stored
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Return True: it is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read decompressed bytes into a buffer; return how many came, 0 at the end."""
        while not self._output:
            if not self._input:
                self._input = self._stored.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._decompress()
        num_read = min(len(buffer), len(self._output))
        buffer[:num_read] = self._output[:num_read]
        self._output = self._output[num_read:]
        return num_read

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._library.ZstdError as error:
            raise _ZstdDamage(str(error)) from None
        self._input = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
