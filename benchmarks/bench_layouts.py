"""What tensor, pipeline and sequence parallelism cost on a CPU: processor seconds of all processes against one process.

All processes share the cores of one machine, so the clock says little; processor time (user and system, summed over
processes) tells what a layout adds: collectives, messages, and work that is done on every rank alike. Each process has
one thread. Every layout trains the same model on the same rows.
usage: python benchmarks/bench_layouts.py [--shape 8m] [--steps 4] [--rounds 3] [--precision bf16]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from corpora import write_corpora
from measure import record

from megaprot.common.quiet import quiet

quiet("megatron")
quiet("torch.distributed")
from megaprot.pretrain import parallel
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.config import DataConfig, ModelConfig, ParallelConfig, PretrainConfig, RunConfig, TrainConfig
from megaprot.pretrain.training import Training

SHAPES = {"8m": (6, 320), "35m": (12, 480)}  # layers, hidden size; 20 heads
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one process": (1, ParallelConfig()),
    "2 data-parallel": (2, ParallelConfig()),
    "2 data-parallel, distributed optimizer": (2, ParallelConfig(distributed_optimizer=True)),
    "TP2": (2, ParallelConfig(tensor=2)),
    "TP2, sequence parallel": (2, ParallelConfig(tensor=2, sequence=True)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "TP2 x PP2, sequence parallel": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True)),
}
ROWS_A_STEP = 4


def work(layout: str, shape: str, precision: Any, corpus: Path, num_steps: int, results: Path) -> None:
    """Be one process of a layout: train, then leave seconds of processor time and residues of the whole world."""
    torch.set_num_threads(1)
    num_layers, hidden_size = SHAPES[shape]
    config = PretrainConfig(
        model=ModelConfig(num_layers=num_layers, hidden_size=hidden_size),
        parallel=LAYOUTS[layout][1],
        data=DataConfig(path=str(corpus), row_tokens=2048, max_sequence_length=512),
        train=TrainConfig(num_steps=1000, global_batch_rows=ROWS_A_STEP, precision=precision, eval_interval=0),
        run=RunConfig(dir=str(corpus / "run")),
    )
    with parallel.processes(config.parallel, 5.0) as place:
        training = Training(config, open_blend(config.data), place)
        steps = training.steps()

        def take(number: int) -> float:
            residues = 0.0
            for _ in range(number):
                step, rows, _ = next(steps)
                is_counted = place.tensor_rank == place.pipeline_rank == 0
                mine = float(sum(row.num_residues for row in rows)) if is_counted else 0.0
                residues += training.take_step(step, rows, [mine])[0].requests[0]
            return residues

        take(2)  # warm up
        dist.barrier()
        started = time.process_time()
        residues = take(num_steps)
        seconds = torch.tensor(time.process_time() - started)
        dist.all_reduce(seconds)
        if place.is_main:
            results.write_text(json.dumps({"seconds": float(seconds), "residues": residues}))


def microseconds_a_residue(layout: str, arguments: list[str], results: Path) -> float:
    """Start the processes of a layout and return their summed processor time a residue."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={LAYOUTS[layout][0]}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, __file__, "--layout", layout, *arguments], check=True, env=environment)
    found = json.loads(results.read_text())
    return 1e6 * float(found["seconds"]) / float(found["residues"])


def main() -> None:
    """Measure all layouts in turn, print and record; or be one process of one."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--shape", choices=SHAPES, default="8m")
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    options.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.layout:
        work(given.layout, given.shape, given.precision, given.corpus, given.steps, given.results)
        return
    costs: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as temporary:
        write_corpora(Path(temporary))
        results = Path(temporary) / "results.json"
        arguments = ["--shape", given.shape, "--steps", str(given.steps), "--precision", given.precision]
        arguments += ["--corpus", str(Path(temporary) / "pfam"), "--results", str(results)]
        for _ in range(given.rounds):
            for name in LAYOUTS:
                costs[name].append(microseconds_a_residue(name, arguments, results))
    medians = {name: statistics.median(values) for name, values in costs.items()}
    alone = medians["one process"]
    record(
        f"layouts_cpu_{given.shape}_{given.precision}",
        [
            {
                "claim": f"processor time a residue, training by layout, ESM-2 {given.shape} shape, {given.precision}",
                "microseconds_a_residue": {name: round(value) for name, value in medians.items()},
                "rounds": {name: [round(value) for value in values] for name, values in costs.items()},
                "overhead_over_one_process": {name: round(value / alone - 1, 3) for name, value in medians.items()},
            }
        ],
        ["megatron-core", "torch"],
    )


if __name__ == "__main__":
    main()
