"""Ranks of a benchmark: a script starts itself in several processes, and each trains and counts what it has spent.

All processes share the cores of one machine, so the clock says little; processor time (user and system, summed over
processes) tells what there was to do. Each process has one thread.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import SHAPES, peak_bytes

from megaprot.common.quiet import quiet

quiet("megatron")
quiet("torch.distributed")
from megaprot.pretrain import parallel
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.config import DataConfig, ModelConfig, ParallelConfig, PretrainConfig, RunConfig, TrainConfig
from megaprot.pretrain.training import Training


def start(script: str, num_processes: int, results: Path, **options: Any) -> dict[str, float]:
    """Start ``script`` in so many processes without CUDA devices, and return what it left in ``results``.

    Args:
        script: Its path.
        num_processes: Processes on this machine.
        results: JSON file that the script is to write; ``--results`` names it.
        options: Further flags and their values.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([*command, script, "--results", str(results), *words], check=True, env=environment)
    found: dict[str, float] = json.loads(results.read_text())
    return found


def config_of(
    shape: str, corpus: Path, row_tokens: int, longest: int, rows_a_step: int = 1, precision: Any = "bf16"
) -> PretrainConfig:
    """Return a run of an ESM-2 shape on the corpora below ``corpus``, on one process."""
    num_layers, hidden_size = SHAPES[shape]
    return PretrainConfig(
        model=ModelConfig(num_layers=num_layers, hidden_size=hidden_size),
        data=DataConfig(path=str(corpus), row_tokens=row_tokens, max_sequence_length=longest),
        parallel=ParallelConfig(),
        train=TrainConfig(num_steps=100_000, global_batch_rows=rows_a_step, precision=precision, eval_interval=0),
        run=RunConfig(dir=str(corpus / f"run_{shape}")),
    )


def train(config: PretrainConfig, num_warm_up: int, num_steps: int, results: Path) -> None:
    """Be one rank of a run: take steps, then leave what the whole world has spent on those that count.

    ``results`` gets seconds of processor time, residues (of each row once) and the sum of peak memory in megabytes.
    """
    torch.set_num_threads(1)
    with parallel.processes(config.parallel, 5.0) as place:
        training = Training(config, open_blend(config.data), place)
        steps = training.steps()

        def take(number: int) -> float:
            residues = 0.0
            for _ in range(number):
                step, rows, _ = next(steps)
                is_counted = place.tensor_rank == place.pipeline_rank == 0  # others have the same rows
                mine = float(sum(row.num_residues for row in rows)) if is_counted else 0.0
                residues += training.take_step(step, rows, [mine])[0].requests[0]
            return residues

        take(num_warm_up)
        dist.barrier()
        started = time.process_time()
        residues = take(num_steps)
        spent = torch.tensor([time.process_time() - started, peak_bytes() / 1e6], dtype=torch.float64)
        dist.all_reduce(spent)
        if place.is_main:
            seconds, megabytes = spent.tolist()
            results.write_text(json.dumps({"seconds": seconds, "residues": residues, "megabytes": megabytes}))
