"""One tensor as ``torch.save`` writes it, in parts that share the tensor's memory.

A zip archive: a pickle that describes the tensor, and its elements as they are, aligned to 64 bytes. ``torch.save``
computes the archive's CRC-32 at a tenth of the rate of the library used here, and shows its bytes to one reader only.
The elements' entry is always of the format for large files (zip64), so that any size takes the same path.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import torch
from isal import isal_zlib
from torch import Tensor

from megaprot.tools.conversion.tensor_source import bytes_of

_ALIGNMENT = 64  # of the elements, from the record's first byte: torch's own
_LONG = 0xFFFFFFFF  # says that the number stands in the extra field
_VERSION, _DAY = 45, 0x21  # zip64; 1 January 1980, so that the same weights give the same bytes
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


class _Pickler(pickle.Pickler):
    """Names the elements instead of holding them, as ``torch.load`` expects."""

    def __init__(self, stream: io.BytesIO, tensor: Tensor) -> None:
        super().__init__(stream, protocol=2)
        self._elements = "storage", _STORAGES[tensor.dtype], "0", "cpu", tensor.numel()

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        """Return (what it is, class, file, device, number of elements) of the tensor's storage."""
        return self._elements if isinstance(obj, torch.storage.TypedStorage) else None


def _header(name: bytes, content: bytes | memoryview, checksum: int, offset: int) -> bytes:
    """Return what stands before an entry, padded so that its content begins aligned."""
    sizes = struct.pack("<2H2Q", 1, 16, len(content), len(content))
    padding = -(offset + 30 + len(name) + len(sizes) + 4) % _ALIGNMENT
    extra = sizes + struct.pack("<2H", 0x4246, padding) + bytes(padding)  # "FB", as torch marks it
    fields = _VERSION, 0, 0, 0, _DAY, checksum, _LONG, _LONG, len(name), len(extra)
    return struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + name + extra


def _directory_entry(name: bytes, content: bytes | memoryview, checksum: int, offset: int) -> bytes:
    extra = struct.pack("<2H2Q", 1, 16, len(content), len(content))
    fields = _VERSION, _VERSION, 0, 0, 0, _DAY, checksum, _LONG, _LONG, len(name), len(extra), 0, 0, 0, 0, offset
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + name + extra


def _end(num_entries: int, start: int, num_bytes: int) -> bytes:
    """Return what follows the directory of entries, which begins at ``start``."""
    place = start + num_bytes
    long = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, num_entries, num_entries, num_bytes, start
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
    return long + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, num_entries, num_entries, _LONG, _LONG, 0)


def record_of(tensor: Tensor) -> list[bytes | memoryview]:
    """Return a contiguous tensor of fp32, bf16 or fp16 as the parts of a file that ``torch.load`` reads."""
    elements, description = bytes_of(tensor), io.BytesIO()
    # What is described begins where the elements do, even if the tensor is part of another.
    _Pickler(description, tensor).dump(torch.frombuffer(elements, dtype=tensor.dtype).view(tensor.shape))
    entries: list[tuple[bytes, bytes | memoryview]] = [
        (b"archive/data.pkl", description.getvalue()),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
        (b"archive/data/0", elements),
    ]
    parts: list[bytes | memoryview] = []
    directory, offset = b"", 0
    for name, content in entries:
        checksum = isal_zlib.crc32(content)
        header = _header(name, content, checksum, offset)
        directory += _directory_entry(name, content, checksum, offset)
        parts += [header, content]
        offset += len(header) + len(content)
    return [*parts, directory + _end(len(entries), offset, len(directory))]
