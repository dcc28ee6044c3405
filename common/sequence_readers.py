"""Streaming readers of sequence files: records one by one, in memory bounded by a block and the longest record.

FASTA and Pfam-A FASTA, plain or gzip-compressed (told by content, not by name), ``-`` for standard input. Files are
read in large blocks that are cut at ``\\n>``: a Python loop over lines would be the bottleneck of preprocessing.
"""

import gzip
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from megaprot.common.errors import InputError

BLOCK_BYTES = 1 << 22
MAX_RECORD_BYTES = 1 << 26  # the longest known protein has under 50,000 residues
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PFAM_FAMILY = re.compile(r"(?:^|\s)(PF\d{5,})(?:\.\d+)?;")


class Record(NamedTuple):
    """One sequence as its file has it: line ends removed, letters untouched; ``line`` is its header's, from 1."""

    identifier: str
    description: str
    sequence: bytes
    line: int

    @property
    def family(self) -> str:
        """Return the Pfam accession without version, ``PF00067`` of ``... PF00067.25;p450;``, or "" for none."""
        found = PFAM_FAMILY.search(self.description)
        return found.group(1) if found else ""


def stop_at_bad_record(message: str) -> None:
    """Raise InputError with the message of a bad record: what a reader does unless told to skip."""
    raise InputError(f"{message}: correct it, or skip such records with --on_bad_record skip.")


class FastaReader:
    """The records of one FASTA file, plain or gzip-compressed; ``-`` is standard input.

    ``num_bytes`` and ``sha256`` describe the bytes read so far, as stored (compressed): the whole file's once it has
    been iterated over. ``on_bad_record`` is called with one clause naming file and line for each record without header,
    identifier or sequence, or with binary data in it; where it returns, the record is skipped.

    Iterating raises InputError where the file is missing, unreadable, empty, truncated or no FASTA file.
    """

    def __init__(self, path: str | Path, on_bad_record: Callable[[str], None] = stop_at_bad_record) -> None:
        self.path = str(path)
        self.name = "standard input" if self.path == "-" else self.path
        self.on_bad_record = on_bad_record
        self._source = _HashedSource(io.BytesIO())

    @property
    def num_bytes(self) -> int:
        """Return the number of stored bytes read so far."""
        return self._source.num_bytes

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the stored bytes read so far, in hexadecimal."""
        return self._source.digest.hexdigest()

    def where(self, line: int) -> str:
        """Return ``file:line``, as messages begin."""
        return f"{self.name}:{line}"

    def __iter__(self) -> Iterator[Record]:
        """Yield the good records in file order."""
        for line, text in self._record_texts():
            header, _, body = text.partition(b"\n")
            fields = header.decode("utf-8", "replace").split(None, 1)
            sequence = body.translate(None, b"\r\n")
            if b"\0" in text:
                self.on_bad_record(f"{self.where(line)}: the record holds binary data")
            elif not fields:
                self.on_bad_record(f"{self.where(line)}: the header names no sequence")
            elif not sequence:
                self.on_bad_record(f"{self.where(line)}: record '{fields[0]}' has no sequence")
            else:
                yield Record(fields[0], fields[1].strip() if len(fields) > 1 else "", sequence, line)

    def _record_texts(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line of the header, text from behind its ``>`` up to the next header) for each record."""
        pending = b"\n"  # a line end before the first byte, so that each header has one before it
        line, in_preamble, is_empty = 0, True, True
        for block in self._blocks():
            is_empty = is_empty and not block.strip()
            *texts, pending = (pending + block).split(b"\n>")
            for text in texts:
                if not in_preamble:
                    yield line, text
                else:
                    self._check_preamble(text)
                    in_preamble = False
                line += text.count(b"\n") + 1
            if len(pending) > MAX_RECORD_BYTES:
                raise InputError(
                    f"{self.where(max(line, 1))}: no header follows in {MAX_RECORD_BYTES >> 20} MiB: "
                    "is this a FASTA file?"
                )
        if is_empty:
            raise InputError(f"{self.name}: is empty: give a FASTA file with at least one sequence.")
        if in_preamble:
            self._check_preamble(pending)
        else:
            yield line, pending

    def _check_preamble(self, text: bytes) -> None:
        """Report what stands before the first header, unless it is blank; ``text`` begins with an added line end."""
        content = text.lstrip()
        if content:
            line = text.count(b"\n", 0, len(text) - len(content))
            kind = "binary data" if b"\0" in content else "text"
            self.on_bad_record(f"{self.where(max(line, 1))}: {kind} stands before the first header line, '>name ...'")

    def _blocks(self) -> Iterator[bytes]:
        """Yield the decompressed content in blocks."""
        try:
            with self._opened() as raw:
                self._source = _HashedSource(raw)
                buffered = io.BufferedReader(self._source, 1 << 20)
                is_compressed = buffered.peek(2).startswith(GZIP_MAGIC)
                stream: Any = gzip.GzipFile(fileobj=buffered) if is_compressed else buffered
                block = stream.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
                while block:
                    yield block
                    block = stream.read(BLOCK_BYTES)
        except EOFError:
            raise InputError(f"{self.name}: the compressed file is truncated: copy or download it again.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self.name}: the compressed file is damaged ({error}): copy it again.") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror}): give a readable FASTA file.") from None

    def _opened(self) -> AbstractContextManager[IO[bytes]]:
        return nullcontext(sys.stdin.buffer) if self.path == "-" else open(self.path, "rb", buffering=0)


def read_fasta(path: str | Path, on_bad_record: Callable[[str], None] = stop_at_bad_record) -> Iterator[Record]:
    """Yield the records of a FASTA file; see :class:`FastaReader`, which also tells the file's checksum."""
    yield from FastaReader(path, on_bad_record)


class _HashedSource(io.RawIOBase):
    """A raw stream that counts and hashes what passes, so that a source need not be read twice (or can be a pipe)."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw: Any = raw
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_read: int = self._raw.readinto(buffer)
        self.digest.update(buffer[:num_read])
        self.num_bytes += num_read
        return num_read
