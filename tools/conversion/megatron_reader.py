"""Read a Megatron checkpoint saved under any layout: tensor by tensor, in one process, without building the model.

A distributed checkpoint's index says where each shard of each tensor lies; a shard is what ``torch.save`` made of it.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from isal import isal_zlib  # its CRC-32 is several times as fast as the standard library's
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megaprot.common.errors import InputError
from megaprot.common.manifest import MANIFEST, damaged_file
from megaprot.pretrain import checkpoint
from megaprot.tools.conversion.model_card import facts_of_run
from megaprot.tools.conversion.names import our_shapes
from megaprot.tools.conversion.safetensors_files import SafetensorsFile
from megaprot.tools.conversion.source_model import CARRIED, SourceModel
from megaprot.tools.conversion.tensor_source import (
    TensorInfo,
    bytes_of,
    fill,
    new_tensor,
    require_no_others,
    require_shapes,
)


class _Slice(io.RawIOBase):
    """Part of an open file, as a file of its own: ``torch.load`` reads it straight into the tensor."""

    def __init__(self, stream: IO[bytes], start: int, length: int) -> None:
        self.stream, self.start, self.length, self.place = stream, start, length, 0

    def readable(self) -> bool:
        """Return True: it is read."""
        return True

    def seekable(self) -> bool:
        """Return True: any place of it can be read."""
        return True

    def tell(self) -> int:
        """Return the place of the next read, from the part's first byte."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place of the part and return it."""
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer up to the part's end; return how many bytes came."""
        wanted = max(0, min(len(buffer), self.length - self.place))
        self.stream.seek(self.start + self.place)
        num_read: int = self.stream.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self.place += num_read
        return num_read


def _load_shard(path: Path, start: int, length: int) -> Tensor:
    """Return the tensor saved at a place of a file, its checksum compared.

    Raises:
        InputError: The file is missing or damaged there, or holds anything but a tensor.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            part = _Slice(stream, start, length)
            with zipfile.ZipFile(part) as archive:
                checksums = {entry.filename.split("/", 1)[1]: entry.CRC for entry in archive.infolist()}
            part.seek(0)
            # What the file says of the tensor and where its elements are; they are read into memory of ours.
            about: Any = torch.load(part, map_location="meta", weights_only=True)  # type: ignore[arg-type]
            storage = about.untyped_storage()
            part.seek(storage._checkpoint_offset)
            elements = new_tensor(TensorInfo(about.dtype, (storage.nbytes() // about.dtype.itemsize,)))
            if not fill(elements, part):
                raise ValueError("it ends early")
        if isal_zlib.crc32(bytes_of(elements)) != checksums["data/0"]:
            raise ValueError("a checksum does not match")
    except Exception as error:
        problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged at byte {start} ({problem}); restore it or use an older step.") from error
    return elements.as_strided(about.shape, about.stride(), about.storage_offset())


class MegatronWeights:
    """The model's tensors in the weights folder of a checkpoint; the optimizer's are passed over.

    Raises:
        InputError: The index is damaged, holds anything but tensors, or its shards do not make up the tensors.
    """

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        index = checkpoint.read_index(weights)
        self._entries = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self._places = {(place.fqn, tuple(place.offset)): where for place, where in index.storage_data.items()}
        self.infos = {
            name: TensorInfo(entry.properties.dtype, tuple(entry.size)) for name, entry in self._entries.items()
        }
        for name, entry in self._entries.items():
            covered = sum(int(torch.Size(chunk.sizes).numel()) for chunk in entry.chunks)
            if covered != torch.Size(entry.size).numel():
                raise InputError(f"{weights} does not hold all of {name}; restore it or use an older step.")

    def read(self, name: str) -> Tensor:
        """Return one whole tensor, put together from its shards."""
        entry, info = self._entries[name], self.infos[name]
        whole = torch.empty(0)
        for chunk in entry.chunks:
            where = self._places.get((name, tuple(chunk.offsets)))
            if where is None:
                raise InputError(f"{self.weights} does not say where {name} is; restore it or use an older step.")
            path = self.weights / Path(where.relative_path).name
            shard = _load_shard(path, where.offset, where.length)
            if shard.dtype != info.dtype or tuple(shard.shape) != tuple(chunk.sizes):
                raise InputError(f"{path} holds another shape of {name} than its index says; use an older step.")
            if tuple(chunk.sizes) == info.shape:
                return shard.contiguous()
            if not whole.numel():
                whole = new_tensor(info)
            window = tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[window] = shard
        return whole


def step_folder_of(folder: Path) -> Path | None:
    """Return the checkpoint that a folder is or, if it is a run's, the newest whole one; None if it is neither.

    Raises:
        InputError: There are checkpoints, but none is whole.
    """
    if (folder / MANIFEST).is_file() or (folder / checkpoint.STATE).is_file():
        problem = checkpoint.problem_of(folder) or damaged_file(folder, checkpoint.SMALL_FILES)
        if problem:
            raise InputError(f"the checkpoint {folder} is not whole: {problem}; restore it or name another step.")
        return folder
    checkpoints = folder / "checkpoints"
    steps = checkpoint.saved_steps(checkpoints)
    if not steps:
        return None
    newest = checkpoint.newest_whole_by_size(checkpoints)
    if newest is None:
        problem = checkpoint.problem_of(checkpoint.step_folder(checkpoints, steps[0]))
        raise InputError(f"no checkpoint in {checkpoints} is whole ({problem}); restore one or name another run.")
    return newest


def read_megatron(step: Path) -> SourceModel:
    """Return the model of a whole checkpoint; raises InputError where its tensors do not fit its configuration."""
    config, vocabulary = checkpoint.read_config(step), checkpoint.read_vocabulary(step)
    tensors = MegatronWeights(step / checkpoint.WEIGHTS)
    num_positions = config.data.max_sequence_length
    shapes = our_shapes(config.model, vocabulary, num_positions)
    require_shapes(tensors.infos, shapes, step)
    require_no_others(tensors.infos, shapes, step)
    carried, architecture = {}, ""
    if (step / CARRIED).is_file():
        file = SafetensorsFile(step / CARRIED)
        carried = {name: file.read(name) for name in file.infos}
        architecture = file.metadata.get("architecture", "")
    facts, sizes = facts_of_run(step, config)
    return SourceModel(
        tensors=tensors,
        model=config.model,
        num_positions=num_positions,
        vocabulary=vocabulary,
        architecture=architecture,
        carried=carried,
        facts=facts,
        sizes=sizes,
    )
