"""What a run goes on from: DeepSpeed's weights and optimizer states, written whole or not at all.

    checkpoints/step_00000100/
        state/             what DeepSpeed writes, one file a rank and part
        progress.json      step, best value, settings that must stay the same
        manifest.json      sizes and checksums of all files

Files are read with torch's restricted unpickler: tensors, plain values and the few classes of DeepSpeed's own states.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaprot.common.errors import InputError
from megaprot.common.files import publish_folder, write_json_atomically
from megaprot.common.manifest import damaged_file, problem_of, sizes_and_checksums, write_manifest
from megaprot.finetune.processes import Place

_STATE, _PROGRESS = "state", "progress.json"
_STEP_NAME = re.compile(r"step_(\d{8,})$")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps behind it.
        best_step: Step of the best validation so far; -1 before the first.
        best_value: Its metric; nan before the first.
        num_worse: Validations since.
        settings: What must be the same to go on.
    """

    step: int
    best_step: int
    best_value: float
    num_worse: int
    settings: dict[str, Any]


def save(folder: Path, engine: Any, progress: Progress, place: Place) -> None:
    """Write a save and remove older ones; all ranks call it.

    Args:
        folder: The run's ``checkpoints``.
        engine: DeepSpeed's engine.
        progress: How far the run is.
        place: This process.
    """
    final = folder / f"step_{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    if place.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    place.barrier()
    engine.checkpoint_engine = _restricted_engine()
    engine.save_checkpoint(str(partial), tag=_STATE, save_latest=False)
    place.barrier()
    if place.is_main:
        best = progress.best_value if math.isfinite(progress.best_value) else None
        write_json_atomically(partial / _PROGRESS, asdict(progress) | {"best_value": best})
        names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
        write_manifest(partial, "megaprot-finetuning-save", sizes_and_checksums(partial, names))
        shutil.rmtree(final, ignore_errors=True)
        publish_folder(partial, final)
        for older in folder.glob("step_*"):
            if older != final:
                shutil.rmtree(older, ignore_errors=True)
    place.barrier()


def newest(folder: Path) -> Path | None:
    """Return the newest save whose files are all there as written, or None; a damaged one is named and passed over."""
    for path in sorted((path for path in folder.glob("step_*") if _STEP_NAME.search(path.name)), reverse=True):
        problem = problem_of(path, [_PROGRESS])
        if not problem and (damaged := damaged_file(path)):
            problem = f"{damaged} does not match its checksum"
        if not problem:
            return path
        print(f"save passed over: {problem}", flush=True)
    return None


def read_progress(save_folder: Path) -> Progress:
    """Return how far a save is; raises InputError where its file is damaged."""
    try:
        found = Progress(**json.loads((save_folder / _PROGRESS).read_text(encoding="utf-8")))
        found.best_value = math.nan if found.best_value is None else float(found.best_value)
        return found
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{save_folder}/{_PROGRESS} is damaged; remove the folder {save_folder}.") from error


def load(save_folder: Path, engine: Any) -> None:
    """Load weights and optimizer states into DeepSpeed's engine; all ranks call it.

    Raises:
        InputError: A file holds something else than DeepSpeed's states.
    """
    engine.checkpoint_engine = _restricted_engine()
    try:
        engine.load_checkpoint(str(save_folder), tag=_STATE, load_lr_scheduler_states=False)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{save_folder} cannot be loaded ({text}); remove it, or go on with the layout and settings "
                         "it was written with.") from error  # fmt: skip


def _restricted_engine() -> Any:
    """Return DeepSpeed's way to files, with torch's restricted unpickler in place of the plain one."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class RestrictedEngine(TorchCheckpointEngine):  # type: ignore[misc]
        """Saves as torch does, and loads no code."""

        def load(self, path: str, map_location: Any = None) -> Any:
            """Return the states in a file."""
            with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)

    return RestrictedEngine()
