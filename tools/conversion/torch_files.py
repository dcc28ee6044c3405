"""Files of ``torch.save`` from anywhere: tensors and plain values are read, code never runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.tools.conversion.tensor_source import TensorInfo


def load_plain(path: Path, harmless: Sequence[Any] = ()) -> Any:
    """Return what a file of ``torch.save`` holds, its tensors mapped from the file where its format allows.

    Args:
        path: The file.
        harmless: Types beside tensors and plain containers that it may hold, as ``torch.serialization.safe_globals``
            takes them.

    Raises:
        InputError: The file is damaged, or asks for anything else; nothing of it has run then.
    """
    try:
        with torch.serialization.safe_globals(list(harmless)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); restore it.") from error
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        asks = " or holds more than tensors and plain values" if reason else ""
        detail = f" ({reason.strip()[:150]})" if reason else ""
        raise InputError(f"{path} is cut short, damaged{asks}{detail}; it was not loaded.") from error


def flat_tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dictionaries by their joined names: ``{"a": {"b": t}}`` gives ``a.b``."""
    if isinstance(value, Tensor):
        return {prefix.removesuffix("."): value}
    if not isinstance(value, Mapping):
        return {}
    return {
        name: tensor for key, part in value.items() for name, tensor in flat_tensors(part, f"{prefix}{key}.").items()
    }


class LoadedTensors:
    """Tensors that a file gave, by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor, with memory of its own."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)


def read_pytorch_model(folder: Path) -> LoadedTensors:
    """Return the weights of ``pytorch_model.bin`` in a folder, or of the shards that its index names."""
    index = folder / "pytorch_model.bin.index.json"
    names = ["pytorch_model.bin"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({error}); restore it.") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= flat_tensors(load_plain(folder / Path(name).name))
    return LoadedTensors(tensors)
