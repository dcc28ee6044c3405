"""Vectors of a frozen tower, each made once: for one run, or for all that name the same folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.files import atomic_write


class VectorCache:
    """Vectors by row, on the CPU, filled as they are first asked for.

    Args:
        num_rows: How many there can be.
        path: File they are kept in; None keeps them in memory alone.

    Raises:
        InputError: The file is damaged.
    """

    def __init__(self, num_rows: int, path: Path | None = None) -> None:
        self.path = path
        self.is_known = np.zeros(num_rows, dtype=bool)
        self._vectors = torch.empty(0)
        self._is_saved = True
        if path is not None and path.is_file():
            self._load(path)

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            held = load_file(path)
            self._vectors, is_known = held["vectors"], held["is_known"].numpy().astype(bool)
        except (SafetensorError, KeyError, OSError) as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}); remove it, and it is made again.") from None
        if is_known.shape != self.is_known.shape or len(self._vectors) != len(is_known):
            raise InputError(f"{path} is of other data; remove it, and it is made again.")
        self.is_known = is_known

    def save(self) -> None:
        """Write the file, if there is one and something is new."""
        if self.path is None or self._is_saved:
            return
        from safetensors.torch import save

        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {"vectors": self._vectors, "is_known": torch.from_numpy(self.is_known.astype(np.uint8))}
        with atomic_write(self.path) as stream:
            stream.write(save(held))
        self._is_saved = True

    def get(self, keys: NDArray[np.int64], compute: Callable[[NDArray[np.int64]], Tensor]) -> Tensor:
        """Return vectors fp32 [len(keys), size].

        Args:
            keys: Their rows.
            compute: Makes the vectors of those places in ``keys`` whose rows are not known yet.
        """
        missing = np.flatnonzero(~self.is_known[keys])
        if len(missing):
            made = compute(missing).detach().float().cpu()
            if not len(self._vectors):
                self._vectors = torch.zeros(len(self.is_known), made.shape[1])
            self._vectors[torch.from_numpy(keys[missing])] = made
            self.is_known[keys[missing]] = True
            self._is_saved = False
        return self._vectors[torch.from_numpy(keys)]


def cache_path(folder: str, kind: str, parts: Iterable[str | bytes]) -> Path | None:
    """Return the file of a cache, named by a checksum of all its vectors are made of; None without a folder."""
    if not folder:
        return None
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return Path(folder) / f"{kind}-{digest.hexdigest()[:16]}.safetensors"
