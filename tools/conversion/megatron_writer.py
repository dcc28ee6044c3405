"""Write weights as a Megatron checkpoint that any layout loads: one process, no process groups, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NoReturn, Self

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megaprot.common.errors import MegaprotError, RunError
from megaprot.common.manifest import sizes_and_checksums
from megaprot.pretrain import checkpoint
from megaprot.pretrain.checkpoint import TrainingState
from megaprot.pretrain.config import DataConfig, PretrainConfig, RunConfig, TrainConfig
from megaprot.tools.conversion.names import our_shapes
from megaprot.tools.conversion.safetensors_files import write_file
from megaprot.tools.conversion.source_model import CARRIED, SourceModel
from megaprot.tools.conversion.tensor_record import record_of
from megaprot.tools.conversion.tensor_source import TensorInfo, made_ahead, write_all

_PRECISIONS: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
_MOST_HELD = 1 << 26  # bytes
SHARD = "__0_0.distcp"  # as torch names what rank 0 writes


class _ChecksummedFile:
    """A new file whose SHA-256 is computed in a thread while the same bytes are written."""

    def __init__(self, path: Path) -> None:
        self.num_bytes, self._num_held = 0, 0
        self._digest, self._stream = hashlib.sha256(), path.open("wb", buffering=0)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[tuple[int, ThreadFuture[None]]] = deque()  # lengths of parts, and their checksums

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._stream.close()

    def write(self, part: bytes | memoryview) -> None:
        """Write all of ``part``; it is held until it is in the checksum, parts of ``_MOST_HELD`` bytes at most."""
        self._pending.append((len(part), self._pool.submit(self._digest.update, part)))
        self.num_bytes += len(part)
        self._num_held += len(part)
        write_all(self._stream, part)
        self._wait(_MOST_HELD)

    def _wait(self, num_held: int) -> None:
        """Wait for the checksum until no more than ``num_held`` bytes are held."""
        while self._num_held > num_held:
            length, taken = self._pending.popleft()
            taken.result()
            self._num_held -= length

    def hexdigest(self) -> str:
        """Return the checksum of what has been written, in hexadecimal."""
        self._wait(0)
        return self._digest.hexdigest()


class _Writer(FileSystemWriter):
    """torch's writer, except that it reads each tensor when it comes to it, and lets go of it then.

    Args:
        weights: Folder to write.
        read: Gives a tensor by its name.
    """

    def __init__(self, weights: Path, read: Callable[[str], Tensor]) -> None:
        super().__init__(weights, sync_files=False)
        self.weights, self.read = weights, read
        self.shard_sha256 = ""

    def storage_meta(self) -> StorageMeta:
        """Return what the index says of the folder: nothing, since its name is a temporary one."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of a plan one after another into one file."""
        results = []
        with _ChecksummedFile(self.weights / SHARD) as file:
            for index, tensor in made_ahead((item.index, self.read(item.index.fqn)) for item in plan.items):
                start = file.num_bytes
                for part in record_of(tensor):
                    file.write(part)
                length = file.num_bytes - start
                results.append(WriteResult(index, length, _StorageInfo(SHARD, start, length)))
                del tensor, part  # before the next is made
            self.shard_sha256 = file.hexdigest()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _raise_own(error: CheckpointException, weights: Path) -> NoReturn:
    """Raise what was the matter in a save: an error of a reader of ours, else one that names the folder."""
    reasons = [failure[0] for failure in error.failures.values()]
    for reason in reasons:
        if isinstance(reason, MegaprotError):
            raise reason from None
    raise RunError(f"{weights} could not be written ({reasons[0]}); free the disk and try again.") from error


def write_megatron(source: SourceModel, folder: Path, dtype: torch.dtype) -> None:
    """Write ``source`` as the checkpoint of a run that has taken no step, without optimizer.

    Args:
        source: The model.
        folder: An empty folder, which becomes the checkpoint.
        dtype: Data type of the weights.

    Raises:
        InputError: A tensor of the source is damaged.
        RunError: The disk is full.
    """
    weights = folder / checkpoint.WEIGHTS
    weights.mkdir()
    shapes = our_shapes(source.model, source.vocabulary, source.num_positions)
    writer = _Writer(weights, lambda name: source.tensors.read(name).to(dtype))
    try:
        torch_checkpoint.save(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
            storage_writer=writer,
            no_dist=True,
        )
    except CheckpointException as error:
        _raise_own(error, weights)
    torch.save({}, weights / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (weights / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
    files = [str(path.relative_to(folder)) for path in weights.iterdir() if path.name != SHARD]
    if source.carried:
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in source.carried.items()}
        write_file(folder / CARRIED, source.carried.items(), infos, {"architecture": source.architecture})
        files.append(CARRIED)
    config = PretrainConfig(
        model=source.model,
        data=DataConfig(max_sequence_length=source.num_positions),
        train=TrainConfig(precision=_PRECISIONS[dtype]),
        run=RunConfig(dir=""),
    )
    shard = weights / SHARD
    entries = {str(shard.relative_to(folder)): {"num_bytes": shard.stat().st_size, "sha256": writer.shard_sha256}}
    entries |= sizes_and_checksums(folder, files)
    checkpoint.describe(folder, entries, TrainingState(), config, source.vocabulary)
