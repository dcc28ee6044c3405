"""safetensors files read and written one tensor at a time, sharded as transformers shards them.

The format: eight bytes with the length of a JSON header, the header ({name: data type, shape, offsets}), the elements.
The file is read instead of mapped, so that its pages do not count as memory of the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically
from megaprot.tools.conversion.tensor_source import TensorInfo, bytes_of, fill, new_tensor, write_all

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
SHARD_BYTES = 5_000_000_000  # transformers' own limit


class SafetensorsFile:
    """One file, its header checked against its size.

    Raises:
        InputError: The file cannot be read, is cut short, or has a header that does not describe it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > min(_LONGEST_HEADER, size - 8):
                    raise ValueError("its header is longer than the file")
                header: dict[str, Any] = json.loads(stream.read(length))
            self._take(header, 8 + length, size)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); restore it.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is cut short or damaged ({error}); restore it.") from error

    def _take(self, header: dict[str, Any], start: int, size: int) -> None:
        self.metadata = header.pop("__metadata__", {})
        end = start
        for name, entry in header.items():
            info = TensorInfo(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            first, last = entry["data_offsets"]
            if first < 0 or min(info.shape, default=0) < 0 or last - first != info.num_bytes:
                raise ValueError(f"the place of {name} does not hold its shape")
            self.infos[name], self._starts[name] = info, start + first
            end = max(end, start + last)
        if end != size:
            raise ValueError(f"it has {size} bytes instead of {end}")

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        tensor = new_tensor(self.infos[name])
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self._starts[name])
            if not fill(tensor, stream):
                raise InputError(f"{self.path} was cut short while it was read; restore it.")
        return tensor


class SafetensorsFolder:
    """The weights of a Hugging Face folder: ``model.safetensors``, or the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self._files: dict[str, SafetensorsFile] = {}
        if not index.is_file():
            single = SafetensorsFile(folder / "model.safetensors")
            self._files = dict.fromkeys(single.infos, single)
        else:
            try:
                weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                shards = {name: SafetensorsFile(folder / Path(name).name) for name in set(weight_map.values())}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index} is damaged ({error}); restore it.") from error
            for name, shard in weight_map.items():
                if name not in shards[shard].infos:
                    raise InputError(f"{shards[shard].path} lacks {name}, which {index.name} places there; restore it.")
                self._files[name] = shards[shard]
        self.infos = {name: file.infos[name] for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._files[name].read(name)


def write_file(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as they come, in the order of ``infos``, whose shapes the header has with ``metadata``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, info in infos.items():
        ends = [offset, offset + info.num_bytes]
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    incoming = iter(tensors)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            _write_tensor(stream, *next(incoming), name, info)


def _write_tensor(stream: BinaryIO, found: str, tensor: Tensor, name: str, info: TensorInfo) -> None:
    assert (found, tensor.dtype, tensor.nbytes) == (name, info.dtype, info.num_bytes), f"{found} for {name}"
    for part in (tensor,) if tensor.is_contiguous() else tensor:  # without a copy of the whole
        write_all(stream, bytes_of(part.contiguous()))


def _shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if size and size + info.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards


def write_model(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    infos: Mapping[str, TensorInfo],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or above ``shard_bytes`` numbered shards and their index as transformers has them.

    Args:
        folder: Where to.
        tensors: (name, tensor) in the order of ``infos``, produced when asked for.
        infos: Data type and shape of each.
        shard_bytes: Most bytes of elements in one file.
    """
    shards = _shards(infos, shard_bytes)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", tensors, infos)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, tensors, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(info.num_bytes for info in infos.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_atomically(folder / "model.safetensors.index.json", index)
