"""What training costs as the work grows: sequence length, model size, corpus size, number of processes.

Each point is a process of its own, with one thread: processor time (user and system, summed over processes) a residue,
and peak memory. Sequences of one length fill rows of 4,096 tokens; corpora are plans of an epoch for log-normal lengths
of mean 158; processes share the data of one batch. Writes ``benchmarks/results/growth.json`` and ``growth.png``.
usage: python benchmarks/bench_growth.py [--steps 3] [--rounds 1]
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

import numpy as np
import torch
import torch.distributed as dist
from measure import ROOT, record

from megaprot.common.packing_plan import plan_epoch
from megaprot.common.quiet import quiet
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.corpus import CorpusWriter

quiet("megatron")
quiet("torch.distributed")
from megaprot.pretrain import parallel
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, TrainConfig
from megaprot.pretrain.training import Training

SHAPES = {"8m": (6, 320, 20), "35m": (12, 480, 20), "150m": (30, 640, 20)}  # layers, hidden size, heads
LENGTHS = (64, 128, 256, 512, 1024, 2048)
CORPORA = (10_000, 100_000, 1_000_000, 10_000_000, 34_353_433)
PROCESSES = (1, 2, 4)
ROW_TOKENS = 4096
NUM_RESIDUES = 400_000


def peak_megabytes() -> float:
    """Peak memory of this process; what getrusage says includes that of the program it was started from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3


def write_corpus(folder: Path, length: int) -> None:
    """Write random sequences of one length, as training and validation part."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, number in (("valid", 10), ("train", NUM_RESIDUES // length)):
        writer = CorpusWriter(folder / split, get_vocabulary("esm"))
        for _ in range(number):
            writer.add(generator.integers(4, 24, length, dtype=np.uint8))
        writer.finish({})


def train(shape: str, corpus: Path, num_steps: int, num_rows: int, results: Path) -> None:
    """Be one process of a run: train, and leave what the whole world has spent."""
    torch.set_num_threads(1)
    num_layers, hidden_size, num_heads = SHAPES[shape]
    config = PretrainConfig(
        model=ModelConfig(num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=num_heads),
        data=DataConfig(path=str(corpus), row_tokens=ROW_TOKENS, max_sequence_length=ROW_TOKENS),
        train=TrainConfig(num_steps=1000, global_batch_rows=num_rows, precision="bf16", eval_interval=0),
        run=RunConfig(dir=str(corpus / f"run_{os.getppid()}")),
    )
    with parallel.processes(config.parallel, 5.0) as place:
        training = Training(config, open_blend(config.data), place)
        steps = training.steps()

        def take(number: int) -> float:
            residues = 0.0
            for _ in range(number):
                step, rows, _ = next(steps)
                mine = float(sum(row.num_residues for row in rows))
                residues += training.take_step(step, rows, [mine])[0].requests[0]
            return residues

        take(1)  # warm up
        dist.barrier()
        started = time.process_time()
        residues = take(num_steps)
        spent = torch.tensor([time.process_time() - started, peak_megabytes()])
        dist.all_reduce(spent)
        if place.is_main:
            micros = 1e6 * float(spent[0]) / residues
            results.write_text(json.dumps({"us": micros, "mb": float(spent[1]) / place.world_size}))


def plan(num_sequences: int, results: Path) -> None:
    """Be a process that plans an epoch of a corpus, and leave what it has spent."""
    lengths = np.random.default_rng(0).lognormal(np.log(158) - 0.32, 0.8, num_sequences).astype(np.int32) + 1
    plan_epoch(lengths[:1000], 2048, 1024, 2, 0, 0)
    started = time.process_time()
    plan_epoch(lengths, 2048, 1024, 2, 0, 0)
    results.write_text(json.dumps({"s": time.process_time() - started, "mb": peak_megabytes()}))


def measured(rounds: int, num_processes: int, results: Path, **options: Any) -> dict[str, float]:
    """Start the processes of a point ``rounds`` times and return the medians."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    found = []
    for _ in range(rounds):
        subprocess.run([*command, __file__, "--results", str(results), *words], check=True, env=environment)
        found.append(json.loads(results.read_text()))
    return {name: round(statistics.median(one[name] for one in found), 3) for name in found[0]}


def draw(tables: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Draw cost on the left axis and memory on the right one, a panel a table; axes begin at 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(4 * len(tables), 3.4), layout="constrained")
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        first, *measures = rows[0]
        is_word = isinstance(rows[0][first], str)
        places = list(range(len(rows))) if is_word else [row[first] for row in rows]
        axis.set(title=name, xlabel=first)
        for drawn, measure, colour, marker in zip((axis, axis.twinx()), measures, ("C0", "C1"), "os", strict=True):
            drawn.plot(places, [row[measure] for row in rows], color=colour, marker=marker)
            drawn.set_ylim(0, 1.15 * max(row[measure] for row in rows))
            drawn.set_ylabel(measure, color=colour)
        if is_word:
            axis.set_xticks(places, [row[first] for row in rows])
        else:
            axis.set_xscale("log")
    figure.savefig(output, dpi=110)


def main() -> None:
    """Measure all points, record and draw; or be one process of one."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--rounds", type=int, default=1)
    for name in ("results", "corpus"):
        options.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    for name in ("sequences", "rows"):
        options.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.shape:
        train(given.shape, given.corpus, given.steps, given.rows, given.results)
        return
    if given.sequences:
        plan(given.sequences, given.results)
        return
    tables: dict[str, list[dict[str, Any]]] = {}
    us, mb = "us a residue", "MB a process"
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), Path(temporary) / "results.json"

        def point(shape: str, length: int, num_processes: int = 1, rows: int = 1) -> dict[str, float]:
            corpus = folder / f"of_{length}"
            if not corpus.exists():
                write_corpus(corpus, length - 2)
            about = {"shape": shape, "corpus": corpus, "steps": given.steps, "rows": rows}
            found = measured(given.rounds, num_processes, results, **about)
            return {us: round(found["us"]), mb: round(found["mb"])}

        tables["sequence length, 8M"] = [{"tokens a sequence": length} | point("8m", length) for length in LENGTHS]
        tables["model size, 256 tokens"] = [{"shape": shape} | point(shape, 256) for shape in SHAPES]
        tables["processes, 8M, 4 rows a step"] = [
            {"processes": str(number)} | point("8m", 256, number, 4) for number in PROCESSES
        ]
        tables["corpus size, plan of an epoch"] = []
        for number in CORPORA:
            found = measured(given.rounds, 1, results, sequences=number)
            row = {"sequences": number, "seconds": found["s"], "MB": round(found["mb"])}
            tables["corpus size, plan of an epoch"].append(row)
    claims = [{"claim": f"cost of training, bf16, one thread a process, by {name}", "rows": rows}
              for name, rows in tables.items()]  # fmt: skip
    record("growth", claims, ["torch", "megatron-core", "numpy", "numba"])
    draw(tables, ROOT / "benchmarks" / "results" / "growth.png")


if __name__ == "__main__":
    main()
