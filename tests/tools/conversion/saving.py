"""Worker: save the same weights under many layouts, and load converted checkpoints under others, in one start.

``python -m tests.tools.conversion.saving RESULTS TASKS``: TASKS is a file of ``torch.save`` with a list of tasks. A
task with ``weights`` saves them; one with ``sequences`` loads a checkpoint and leaves the logits in ``TASKS.N``.
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain import checkpoint, parallel
from megaprot.pretrain.checkpoint import TrainingState
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.optimizer import build_optimizer
from tests.distributed.layouts import Layouts, to_config
from tests.distributed.run import run_processes
from tests.pretrain.global_weights import load_global
from tests.pretrain.tiny import batch_of


def save_under(config: PretrainConfig, place: parallel.Place, weights: dict[str, Tensor], folder: Path) -> Path:
    """Save a model with these whole tensors, its optimizer beside them, as a run does."""
    vocabulary = get_vocabulary("esm")
    chunks = build_model(config, transformer_config(config), vocabulary, place)
    optimizer = build_optimizer(config.optim, config.train, config.parallel, chunks)
    for chunk in chunks:
        load_global(chunk.module, weights)
    optimizer.reload_model_params()
    return checkpoint.Save(folder, chunks, optimizer, TrainingState(), config, vocabulary).finish()


def logits_under(config: PretrainConfig, place: parallel.Place, task: dict[str, Any]) -> Tensor | None:
    """Load a checkpoint and return this rank's share of the logits; None on the first of two pipeline stages."""
    vocabulary = get_vocabulary("esm")
    chunks = build_model(config, transformer_config(config), vocabulary, place)
    checkpoint.load(Path(task["folder"]), chunks)
    model = chunks[0].module.eval()
    batch = batch_of(task["sequences"], task["row_tokens"], vocabulary.pad, place.device)
    with torch.no_grad():
        if place.pipeline_rank:
            hidden = torch.empty((task["row_tokens"], 1, config.model.hidden_size))
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output: Tensor = model(batch)
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
            return None
    return output.cpu()


def run_tasks(tasks: list[tuple[PretrainConfig, dict[str, Any]]], folder: Path) -> list[list[Tensor]]:
    """Do the tasks on four processes; returns the logits of all tensor-parallel ranks, by task."""
    listed = folder / "tasks.pt"
    torch.save([{"config": asdict(config)} | more for config, more in tasks], listed)
    run_processes("tests.tools.conversion.saving", 4, [str(listed)])
    return [
        torch.load(f"{listed}.{number}", weights_only=True) if "sequences" in more else []
        for number, (_, more) in enumerate(tasks)
    ]


def main() -> None:
    """Do every task of the list."""
    results, listed = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    layouts = Layouts(parallel.start_processes(5.0))
    for number, task in enumerate(torch.load(listed, weights_only=True)):
        config = to_config(task["config"])
        place = layouts.lay_out(config.parallel)
        if "weights" in task:
            save_under(config, place, task["weights"], Path(task["folder"]))
            continue
        everyone: list[Any] = [None] * place.world_size
        dist.all_gather_object(everyone, (place.data_rank, place.tensor_rank, logits_under(config, place, task)))
        if place.is_main:
            shares = [(rank, part) for copy, rank, part in everyone if not copy and part is not None]
            torch.save([part for _, part in sorted(shares, key=lambda share: share[0])], f"{listed}.{number}")
    if dist.get_rank() == 0:
        results.write_text(json.dumps({"done": True}) + "\n")
    parallel.stop_processes()


if __name__ == "__main__":
    main()
