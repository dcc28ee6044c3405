"""A fine-tuned model on disk: the encoder as a Hugging Face folder, the head, and what the task learned.

task.json          task, head, labels, what was learned, versions
head.safetensors   the head's weights
encoder/           config.json, model.safetensors, tokenizer: any tool that reads such folders takes it
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.files import folder_written_whole, write_json_atomically
from megaprot.finetune.config import HeadConfig, LabelConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.hugging_face import copy_tokenizer, load_encoder
from megaprot.finetune.processes import Place
from megaprot.finetune.task import Task
from megaprot.finetune.tasks import open_task
from megaprot.finetune.tuning import gathered, plain_weights

TASK, HEAD, ENCODER = "task.json", "head.safetensors", "encoder"
BEST, LAST = "best", "last"
RUNS = "runs.json"
"""In a folder of several runs: their validation metrics by setting, and the runs of the best setting."""


@dataclass
class FinetunedModel:
    """A model that predicts.

    Attributes:
        task: What it predicts.
        model: Encoder and head, in evaluation mode.
        encoder: The encoder within.
        description: ``task.json``.
        folder: Where it was read.
    """

    task: Task
    model: torch.nn.Module
    encoder: Encoder
    description: dict[str, Any]
    folder: Path


def write_model(
    folder: Path, model: Any, task: Task, head: HeadConfig, source: Path, about: dict[str, Any], place: Place
) -> None:
    """Write a model as ``folder``, in place of what is there; all ranks call it.

    Args:
        folder: Where to.
        model: Has ``encoder`` and ``head``; their weights may be sharded.
        task: What it predicts.
        head: How the head was made.
        source: Folder the encoder came from, whose tokenizer goes along.
        about: What else ``task.json`` says: step, validation metrics.
        place: Rank 0 writes.
    """
    towers = {ENCODER: (model.encoder, source), **task.further_encoders(model)}
    tensors = {
        name: {inner: weight.cpu().contiguous() for inner, weight in plain_weights(tower)}
        for name, (tower, _) in towers.items()
    }
    with gathered(list(model.head.parameters())):
        head_tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in model.head.state_dict().items()}
    if place.is_main:
        description = {
            "task": task.name,
            "head": asdict(head) | {"name": task.head_name(head)},
            "labels": asdict(task.labels),
            "learned": task.state(),
            **about,
        }
        _replace(folder, task, towers, tensors, head_tensors, description)
    place.barrier()


def _replace(
    folder: Path,
    task: Task,
    towers: dict[str, tuple[Any, Path]],
    tensors: dict[str, dict[str, Tensor]],
    head_tensors: dict[str, Tensor],
    description: dict[str, Any],
) -> None:
    """Write a model folder under another name and put it in the old one's place."""
    from safetensors.torch import save_file

    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    with folder_written_whole(fresh) as partial:
        for name, (tower, source) in towers.items():
            tower.model.save_pretrained(partial / name, state_dict=tensors[name])
            copy_tokenizer(source, partial / name)
        task.write_files(partial)
        save_file(head_tensors, partial / HEAD)
        write_json_atomically(partial / TASK, description)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_model(path: Path) -> Path:
    """Return the folder of a model: ``path`` itself, or ``best`` in the folder of a run.

    Raises:
        InputError: There is none.
    """
    for folder in (path, path / BEST):
        if (folder / TASK).is_file():
            return folder
    raise InputError(f"{path} holds no fine-tuned model (no {TASK}); name a folder that megaprot finetune wrote.")


def read_grid(path: Path) -> dict[str, Any]:
    """Return ``runs.json`` of a folder of several runs, nothing where there is none; raises InputError for damage."""
    if not (path / RUNS).is_file():
        return {}
    try:
        grid: dict[str, Any] = json.loads((path / RUNS).read_text(encoding="utf-8"))
        grid["best_runs"], grid["settings"], grid["metric"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / RUNS} is damaged; name the folder of one run.") from error
    return grid


def models_of(path: Path) -> list[Path]:
    """Return the model folders that ``path`` names: one, or those of the best setting's seeds of several runs."""
    return [find_model(path / name) for name in read_grid(path).get("best_runs", [""])]


def read_model(
    path: Path, task_name: str = "", device: torch.device | None = None, precision: str = "fp32"
) -> FinetunedModel:
    """Return a fine-tuned model in evaluation mode.

    Args:
        path: Folder of a run or of one of its models.
        task_name: Name or Python file of its task; empty takes the name in the folder.
        device: Where to; the CPU if left out.
        precision: Type of the weights.

    Raises:
        InputError: The folder is damaged, or made for another task.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find_model(path)
    try:
        description = json.loads((folder / TASK).read_text(encoding="utf-8"))
        task = open_task(task_name or description["task"], LabelConfig(**description["labels"]))
        head_config = HeadConfig(**description["head"])
        if description["task"] not in (task.name, *task.also_reads):
            raise InputError(f"{folder} predicts {description['task']}, not {task.name}; give --task "
                             f"{description['task']}.")  # fmt: skip
        task.restore(description["learned"])
        task.read_files(folder)
        encoder = load_encoder(folder / description.get("encoder", ENCODER), device=device, precision=precision)
        head = task.build_head(head_config, encoder)
        head.load_state_dict(load_file(folder / HEAD))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        text = str(error).splitlines()[0]
        raise InputError(f"{folder} is damaged ({text}); restore it or train again.") from error
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    head = head.to(device=encoder.device, dtype=dtype)
    model = task.build_model(encoder, head, is_frozen=True).eval()
    return FinetunedModel(task, model, encoder, description, folder)
