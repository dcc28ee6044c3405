"""What every reader of weights offers: names and shapes at once, tensors one at a time.

Readers take memory for a tensor from :func:`new_tensor`, which uses that of tensors that are gone again: pages that a
process has never touched cost more than filling them from the page cache.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megaprot.common.errors import InputError

Key = TypeVar("Key")
_SMALL = 1 << 20  # bytes; below it the allocator keeps memory itself
_LARGE = 1 << 27  # bytes; above it only the largest models have tensors
_WRITE_BYTES = 1 << 20  # in one call: for longer ones Linux seeks pages in long runs, and finds those it has never used
_MOST_SPARE = 1 << 28  # bytes kept that nothing uses just now


@dataclass(frozen=True)
class TensorInfo:
    """Data type and shape of a tensor that is not in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class TensorSource(Protocol):
    """Weights by name; only the one being read is in memory."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Data type and shape of every tensor."""

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor, contiguous and on the CPU; InputError where its file is damaged."""


class DerivedTensors:
    """Tensors that are computed when asked for, from those of another source."""

    def __init__(self, infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
        self.infos, self._read = infos, read

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""
        return self._read(name)


class _Blocks:
    """Memory that is used again when nothing refers to the tensor it was last given to."""

    def __init__(self) -> None:
        self._held: list[tuple[NDArray[np.uint8], weakref.ref[NDArray[np.uint8]]]] = []
        self._lock = Lock()

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return memory uint8 [num_bytes] of any content, given back when the array and its views are gone."""
        with self._lock:
            free = [block for block, used in self._held if used() is None]
            busy = [(block, used) for block, used in self._held if used() is not None]
            fitting = [block for block in free if block.nbytes >= num_bytes]
            block = min(fitting, key=len) if fitting else np.empty(num_bytes, dtype=np.uint8)
            view = block[:num_bytes]
            self._held = [(block, weakref.ref(view)), *busy]
            spare = 0
            for other in free:
                if other is not block and spare + other.nbytes <= _MOST_SPARE:
                    spare += other.nbytes
                    self._held.append((other, weakref.ref(other[:0])))
            return view


_blocks = _Blocks()


def new_tensor(info: TensorInfo) -> torch.Tensor:
    """Return a tensor of any content; the largest, which few models have, get memory for themselves."""
    if not _SMALL <= info.num_bytes <= _LARGE:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.from_numpy(_blocks.take(info.num_bytes)).view(info.dtype).view(info.shape)


def made_ahead(items: Iterator[tuple[Key, torch.Tensor]]) -> Iterator[tuple[Key, torch.Tensor]]:
    """Yield ``items``, each made in a thread while the one before it is used; reading and writing then overlap.

    A large tensor has memory for itself: the next is made when it has been used and let go.
    """
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        made = pool.submit(next, items, None)
        while (item := made.result()) is not None:
            is_large = item[1].nbytes > _LARGE
            if not is_large:
                made = pool.submit(next, items, None)
            yield item
            if is_large:
                del item, made
                made = pool.submit(next, items, None)
    finally:
        pool.shutdown(wait=False)  # whoever takes no more need not wait


def require_shapes(found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise InputError, naming the first tensor, where one is missing or of another shape than the configuration's."""
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{where} lacks the tensor {name}; give a whole checkpoint of a masked-language model.")
        if found[name].shape != shape:
            raise InputError(
                f"the tensor {name} of {where} has the shape {list(found[name].shape)}, but its configuration asks for "
                f"{list(shape)}; restore the configuration it was saved with."
            )


def require_no_others(found: Iterable[str], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise InputError, naming the first, for a tensor that the configuration knows nothing of (a further layer)."""
    for name in found:
        if name not in expected:
            raise InputError(
                f"{where} holds the tensor {name}, which its configuration has no place for; restore the configuration "
                "it was saved with."
            )


def common_dtype(infos: Iterable[TensorInfo], where: Path) -> torch.dtype:
    """Return the one floating-point type of the weights; raises InputError for a mixture or another type."""
    found = {info.dtype for info in infos}
    if len(found) != 1 or not found <= {torch.float32, torch.bfloat16, torch.float16}:
        listed = ", ".join(sorted(map(str, found)))
        raise InputError(f"the weights of {where} are {listed}; give them in one of fp32, bf16 and fp16.")
    return found.pop()


def fill(tensor: torch.Tensor, stream: io.RawIOBase) -> bool:
    """Read the elements of a contiguous tensor from a stream's place on; return whether it held them all."""
    target = bytes_of(tensor)
    while target:
        num_read = stream.readinto(target)
        if not num_read:
            return False
        target = target[num_read:]
    return True


def write_all(stream: io.FileIO | BinaryIO, elements: bytes | memoryview) -> None:
    """Write all bytes to a stream, buffered or not, ``_WRITE_BYTES`` at a time."""
    rest = memoryview(elements)
    while rest:
        rest = rest[stream.write(rest[:_WRITE_BYTES]) :]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the elements of a contiguous tensor as bytes, without a copy; writing to them writes to the tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
