"""The vectors a run has made so far, in a folder beside its output: a killed run goes on from there.

Each process writes parts of its own, whole files that appear by renaming, so that no kill leaves one damaged and
several processes share the folder. When all proteins are in, the parts become the output and the folder goes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megaprot.common.errors import RunError
from megaprot.common.files import sync_folder
from megaprot.common.part_folder import begin_parts, part_folder
from megaprot.tools.conversion.safetensors_files import SafetensorsFile, write_file
from megaprot.tools.conversion.tensor_source import TensorInfo

PART_BYTES = 1 << 26
"""A part is written when it holds this much, which bounds memory,"""
PART_SECONDS = 60.0
"""or when the last was written this long ago, which bounds what a kill costs."""


class Entry(NamedTuple):
    """One protein's vectors as the output stores them."""

    key: str
    identifier: str
    vectors: Tensor


class Parts:
    """The parts of one output.

    Args:
        output: The file they will become.
        rank: This process among those that write.
        part_bytes: Bytes of vectors a part holds.
    """

    def __init__(self, output: Path, rank: int = 0, part_bytes: int = PART_BYTES) -> None:
        self.folder = part_folder(output)
        self.rank = rank
        self.part_bytes = part_bytes
        self._waiting: dict[str, Entry] = {}
        self._num_bytes = 0
        self._written = time.monotonic()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or make sure that what a killed run left there was made with the same settings.

        Raises:
            InputError: It was not; the text names the first that differs.
        """
        begin_parts(self.folder, settings)

    def places(self) -> dict[str, SafetensorsFile]:
        """Return the part that holds each key."""
        parts = [SafetensorsFile(path) for path in sorted(self.folder.glob("part-*.safetensors"))]
        return {key: part for part in parts for key in part.infos}

    def add(self, entry: Entry) -> None:
        """Take one protein's vectors; they are written once a part is full, or a minute has gone by."""
        self._waiting[entry.key] = entry
        self._num_bytes += entry.vectors.nbytes
        if self._num_bytes >= self.part_bytes or time.monotonic() - self._written >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one part."""
        if not self._waiting:
            return
        number = len(list(self.folder.glob(f"part-{self.rank}-*.safetensors")))
        final = self.folder / f"part-{self.rank}-{number:06d}.safetensors"
        partial = self.folder / f".{final.name}.{os.getpid()}"
        tensors = {key: entry.vectors for key, entry in self._waiting.items()}
        infos = {key: TensorInfo(vectors.dtype, tuple(vectors.shape)) for key, vectors in tensors.items()}
        identifiers = {key: entry.identifier for key, entry in self._waiting.items()}
        try:
            write_file(partial, tensors.items(), infos, {"identifiers": json.dumps(identifiers)})
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, final)
            sync_folder(self.folder)
        except OSError as error:
            raise RunError(
                f"{final} cannot be written ({error.strerror}); make room and run the command again."
            ) from None
        self._waiting, self._num_bytes, self._written = {}, 0, time.monotonic()

    def entries(self, keys: Mapping[str, None]) -> Iterator[Entry]:
        """Yield the vectors of all keys in their order.

        Raises:
            RunError: One is in no part.
        """
        places = self.places()
        identifiers: dict[int, dict[str, str]] = {}
        for key in keys:
            if key not in places:
                raise RunError(f"{self.folder} lacks the vectors of {key}; run the command again.")
            part = places[key]
            if id(part) not in identifiers:
                identifiers[id(part)] = json.loads(part.metadata["identifiers"])
            yield Entry(key, identifiers[id(part)][key], part.read(key))

    def infos(self, keys: Mapping[str, None]) -> dict[str, TensorInfo]:
        """Return type and shape of each key's vectors, in the keys' order; the keys must be there."""
        places = self.places()
        return {key: places[key].infos[key] for key in keys}

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
