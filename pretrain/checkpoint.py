"""Checkpoints that are whole or not there: saved by all ranks, resharded on load, never trusted by name alone.

``RUN/checkpoints/step_00001000/`` holds ``weights/`` (megatron-core's distributed checkpoint of model and optimizer,
one key a layer), ``state.json`` (step, data position, guards), ``config.yaml``, ``vocabulary.json`` and
``manifest.json`` (size and sha256 of every other file). A save is written under a temporary name, synced, given its
manifest, then renamed; the newest complete one is found by looking.

Loading runs nothing that a file brings along: the plain part is read by ``torch.load`` with ``weights_only``, the
tensor part likewise, and the index, which torch unpickles, only after a restricted unpickler has accepted it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megaprot.common import manifest
from megaprot.common.command_line import parse_config
from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.errors import InputError, LostPeersError, RunError
from megaprot.common.files import publish_folder, write_json_atomically
from megaprot.common.manifest import damaged_file, sizes_and_checksums, write_manifest
from megaprot.common.safe_pickle import load_restricted
from megaprot.common.vocabulary import Vocabulary
from megaprot.common.world import lost_peers
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.model.initialisation import SHARDING_METADATA
from megaprot.pretrain.shard_writer import in_host_memory, no_writer_processes

OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
STATE, WEIGHTS, CONFIG, VOCABULARY = (
    "state.json",
    "weights",
    "config.yaml",
    "vocabulary.json",
)
SMALL_FILES = (STATE, CONFIG, VOCABULARY)
_STEP_NAME = re.compile(r"step_(\d{8,})$")
_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_DCP_PLANNER = "torch.distributed.checkpoint.planner"
# All that the index of a distributed checkpoint of tensors is made of: plain records, enumerations, data types.
_INDEX_TYPES = {
    *((_DCP_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "StorageMeta")),
    *((_DCP_METADATA, name) for name in ("TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    *((_DCP_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(("torch", name) for name in ("Size", "float32", "bfloat16", "float16", "int64")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


@dataclass
class TrainingState:
    """What a run must remember beside weights and optimizer to go on bit for bit.

    Attributes:
        step: Optimizer steps behind it (skipped ones counted).
        position: Data position of the next row (``StreamPosition.to_dict``); empty before the first step.
        consumed_rows: Rows behind it, blank ones not counted.
        consumed_residues: Residues behind it.
        skipped_steps: Steps skipped so far.
        skipped_in_a_row: Steps skipped since the last good one.
        recent_losses: Window of the spike test, oldest first.
        recent_grad_norms: The same for gradient norms.
        data_fingerprint: identity of the training data (``Blend.fingerprint``).
    """

    step: int = 0
    position: dict[str, Any] = field(default_factory=dict)
    consumed_rows: int = 0
    consumed_residues: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)
    data_fingerprint: str = ""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where the save after ``step`` steps lives."""
    return checkpoints / f"step_{step:08d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a folder, newest first; whether they are complete is for ``problem_of`` to say."""
    if not checkpoints.is_dir():
        return []
    matches = (_STEP_NAME.match(entry.name) for entry in checkpoints.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def problem_of(folder: Path) -> str:
    """Return what makes a save incomplete by presence and sizes, naming the file, or an empty string."""
    return manifest.problem_of(folder, SMALL_FILES)


def newest_whole_by_size(checkpoints: Path) -> Path | None:
    """Return the newest save whose files are all there in their sizes, None without one.

    Checksums are compared of the small files alone, which take no time.
    """
    for step in saved_steps(checkpoints):
        folder = step_folder(checkpoints, step)
        if not problem_of(folder) and not damaged_file(folder, SMALL_FILES):
            return folder
    return None


def newest_complete(checkpoints: Path) -> Path | None:
    """Return the newest save that is whole and undamaged, or None where nothing was ever saved.

    Every rank calls this; each checks the checksums of a share of the files. Saves that are not whole are named on
    standard output and passed over.

    Raises:
        InputError: There are saves, but not one of them is whole.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problems = []
    # One list for all: on a file system that is not shared, or is slow to agree, ranks would see different ones.
    steps = [saved_steps(checkpoints)]
    if size > 1:
        dist.broadcast_object_list(steps)
    for step in steps[0]:
        folder = step_folder(checkpoints, step)
        problem = problem_of(folder)
        if not problem:
            damaged = damaged_file(folder, share=rank, num_shares=size)
            problem = f"{damaged} does not match its checksum" if damaged else ""
        if size > 1:
            found: list[Any] = [None] * size
            dist.all_gather_object(found, problem)
            problem = next(filter(None, found), "")
        if not problem:
            return folder
        problems.append(problem)
        if rank == 0:
            print(f"checkpoint passed over: {problem}", flush=True)
    if problems:
        raise InputError(f"no checkpoint in {checkpoints} is whole ({problems[0]}); restore one or name a new run.dir.")
    return None


def _sharded_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    """Return what distributed checkpointing saves or fills: tensors by global name, one set a model chunk."""
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        whole = chunk.module.sharded_state_dict(metadata=dict(SHARDING_METADATA))
        # The parallel layers' empty extra states would be saved as pickled bytes; only tensors are ours to keep.
        state[f"model{index}"] = {name: part for name, part in whole.items() if not isinstance(part, ShardedObject)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state if len(chunks) > 1 else state["model0"], is_loading=is_loading, metadata=dict(OPTIMIZER_METADATA)
        )
    return state


def _on_every_rank(message: str) -> None:
    """Raise RunError on all ranks alike if any of them has a ``message``."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, message)
    failure = next(filter(None, found), "")
    if failure:
        raise RunError(failure)


class Save:
    """A save in progress: begun with the tensors as they are now, finished by all ranks together; all ranks make it.

    Args:
        checkpoints: Folder of the saves.
        chunks: This rank's model.
        optimizer: Its optimizer.
        state: What the run remembers; its step names the save.
        config: Configuration of the run.
        vocabulary: Tokens of the corpus.
        in_background: Copy the tensors to host memory and write them in a thread, while training goes on.

    Raises:
        RunError: A rank cannot write; older saves are untouched.
    """

    def __init__(
        self,
        checkpoints: Path,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        state: TrainingState,
        config: PretrainConfig,
        vocabulary: Vocabulary,
        in_background: bool = False,
    ) -> None:
        self.step = state.step
        self.final = step_folder(checkpoints, state.step)
        self._partial = self.final.with_name(f".{self.final.name}.partial")
        self._state, self._config, self._vocabulary = copy.deepcopy(state), config, vocabulary
        self._checksums: dict[str, Any] = {}
        self._rank, self._failure = dist.get_rank(), ""
        self._thread: Thread | None = None
        failure = ""
        if self._rank == 0:
            try:
                shutil.rmtree(self._partial, ignore_errors=True)
                (self._partial / WEIGHTS).mkdir(parents=True)
            except OSError as error:
                failure = (
                    f"{self._partial} cannot be written ({error.strerror}); free the disk or choose another run.dir."
                )
        _on_every_rank(failure)
        with self._named_failures():
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            tensors = _sharded_state(chunks, optimizer, False)
            with no_writer_processes():
                request = dist_checkpointing.save(
                    tensors, str(self._partial / WEIGHTS), strategy, async_sharded_save=True
                )
            self._finalize = request.finalize_fns
            write = self._in_host_memory(request, in_background)
        if in_background:
            self._thread = Thread(target=self._write, args=(write,), daemon=True)
            self._thread.start()
        else:
            self._write(write)

    def _write(self, write: Callable[[], None]) -> None:
        """Write this rank's shard; what goes wrong is told when the save is finished."""
        try:
            write()
            self._checksums = _checksums_of(self._partial, f"__{self._rank}_*")
        except Exception as error:  # whatever it was: without its shard in the manifest no save is whole
            self._failure = self._sentence("written", _last_line(error))

    def _in_host_memory(self, request: AsyncRequest, in_background: bool) -> Callable[[], None]:
        try:
            return in_host_memory(request, in_background)
        except (RuntimeError, MemoryError) as error:
            raise RunError(
                f"the host has no memory for the checkpoint {self.final} ({_last_line(error)}); give the job more, or "
                "set train.background_saves to false, which takes less."
            ) from error

    def _sentence(self, what: str, reason: str) -> str:
        return f"the checkpoint {self.final} could not be {what} ({reason}); free the disk and start again."

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Raise RunError or LostPeersError in place of what megatron-core raises where a rank cannot write."""
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
            if lost_peers(error):
                raise
            if isinstance(error, CheckpointException) and not error.failures:  # those of others are told to them alone
                raise LostPeersError(
                    f"another process could not write its part of {self.final}; see its message."
                ) from error
            # At once and alone: the other ranks are inside another collective of the save, and lose this one.
            raise RunError(self._sentence("written", _last_line(error))) from error

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is on the disk, so that :meth:`finish` does not wait for it."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for all parts, write index and manifest, give the folder its name and return it; all ranks call it.

        Raises:
            RunError: A rank could not write (a full disk, say); the unfinished folder is left under its temporary name
                and older saves are untouched.
        """
        if self._thread is not None:
            self._thread.join()
        with self._named_failures():
            for finalize in self._finalize:
                finalize()
        if self._rank == 0 and not self._failure:
            try:
                for name in ("common.pt", "metadata.json", ".metadata"):
                    self._checksums |= _checksums_of(self._partial, name)
            except OSError as error:
                self._failure = self._sentence("written", _last_line(error))
        _on_every_rank(self._failure)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._checksums)
        failure = ""
        if self._rank == 0:
            try:
                _finish(self._partial, self.final, gathered, self._state, self._config, self._vocabulary)
            except OSError as error:
                failure = self._sentence("finished", _last_line(error))
        _on_every_rank(failure)
        return self.final


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__


def _checksums_of(partial: Path, pattern: str) -> dict[str, Any]:
    """Return size and sha256 of files of the weights folder."""
    return sizes_and_checksums(partial, [str(path.relative_to(partial)) for path in (partial / WEIGHTS).glob(pattern)])


def _finish(
    partial: Path,
    final: Path,
    checksums: list[dict[str, Any]],
    state: TrainingState,
    config: PretrainConfig,
    vocabulary: Vocabulary,
) -> None:
    """Write the small files and the manifest, then give the folder its name."""
    describe(partial, {name: entry for part in checksums for name, entry in part.items()}, state, config, vocabulary)
    if final.exists():  # an earlier try at the same step: replaced by the proven new one
        shutil.rmtree(final)
    publish_folder(partial, final)


def describe(
    folder: Path, files: dict[str, Any], state: TrainingState, config: PretrainConfig, vocabulary: Vocabulary
) -> None:
    """Write the small files of a save and, last, its manifest.

    Args:
        folder: The save, under its temporary name.
        files: Sizes and checksums of what is already there.
        state: What the run remembers.
        config: Configuration of the run.
        vocabulary: Tokens of the corpus.
    """
    (folder / CONFIG).write_text(config_to_yaml(config), encoding="utf-8")
    write_json_atomically(folder / STATE, asdict(state))
    write_json_atomically(folder / VOCABULARY, vocabulary.to_dict())
    listed = files | sizes_and_checksums(folder, SMALL_FILES)
    write_manifest(folder, "megaprot-checkpoint", listed)


def prune(checkpoints: Path, keep: int, newest: int) -> None:
    """Delete all but the last ``keep`` complete saves up to step ``newest``, the one just proven; 0 keeps all.

    Saves that are incomplete or of later steps, which a resumed run has passed over, are left to look at; what a killed
    process left half-written or half-deleted is removed.
    """
    for leftover in [*checkpoints.glob(".step_*.partial"), *checkpoints.glob(".step_*.deleted")]:
        shutil.rmtree(leftover, ignore_errors=True)
    earlier = (step for step in saved_steps(checkpoints) if step <= newest)
    complete = [step for step in earlier if not problem_of(step_folder(checkpoints, step))]
    for step in complete[keep:] if keep else []:
        folder = step_folder(checkpoints, step)
        doomed = folder.with_name(f".{folder.name}.deleted")
        os.rename(folder, doomed)  # first out of sight, so that a half-deleted save is never found
        shutil.rmtree(doomed)


def read_state(folder: Path) -> TrainingState:
    """Return ``state.json`` of a complete save; raises InputError if it is not one."""
    try:
        return TrainingState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / STATE} cannot be read ({error}); restore it or use an older step.") from error


def read_config(folder: Path) -> PretrainConfig:
    """Return the configuration a save was made with; raises InputError if it cannot be read."""
    return parse_config(PretrainConfig, ["--config", str(folder / CONFIG)], program="megaprot", description="")


def read_vocabulary(folder: Path) -> Vocabulary:
    """Return the vocabulary a save was trained with; raises InputError if it cannot be read."""
    try:
        return Vocabulary.from_dict(json.loads((folder / VOCABULARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{folder / VOCABULARY} cannot be read ({error}); restore it or use an older step.") from error


def read_index(weights: Path) -> Metadata:
    """Return where each tensor of a weights folder lies; raises InputError unless it describes tensors alone."""
    index = load_restricted(weights / ".metadata", _INDEX_TYPES)
    if not isinstance(index, Metadata):
        raise InputError(f"{weights / '.metadata'} is not the index of a checkpoint; it was not loaded.")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(f"{weights} holds the object {name}, which is no tensor; it was not loaded.")
    return index


def _require_harmless(weights: Path) -> None:
    """Raise InputError unless a weights folder describes tensors alone, beside a common part of plain values."""
    read_index(weights)
    try:
        torch.load(weights / "common.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        problem = f"{weights / 'common.pt'} is damaged or holds more than plain values; it was not loaded."
        raise InputError(problem) from error


def load(folder: Path, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None = None) -> None:
    """Load weights, and the optimizer if given, into any layout; all ranks call it.

    Raises:
        InputError: The save would build something other than tensors and plain values, or does not fit the model.
    """
    weights = folder / WEIGHTS
    _require_harmless(weights)
    sharded = _sharded_state(chunks, optimizer, True)
    try:
        loaded = dist_checkpointing.load(sharded, str(weights))
    except (CheckpointingException, CheckpointException, RuntimeError, KeyError) as error:
        raise InputError(
            f"{folder} does not fit this model ({_last_line(error)}); give the model it was saved with."
        ) from error
    for number, chunk in enumerate(chunks):
        extra_states = dict.fromkeys(name for name in chunk.module.state_dict() if name.endswith("_extra_state"))
        chunk.module.load_state_dict(loaded[f"model{number}"] | extra_states)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
