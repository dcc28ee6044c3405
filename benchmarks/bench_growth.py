"""What training costs as the work grows: sequence length, model size, corpus size, number of processes.

Each point is a process of its own, with one thread: processor time (user and system, summed over processes) a residue,
and peak memory. Sequences of one length fill rows of 4,096 tokens; corpora are plans of an epoch for log-normal lengths
of mean 158; processes share the data of one batch. Writes ``benchmarks/results/growth.json`` and ``growth.png``.
usage: python benchmarks/bench_growth.py [--steps 1] [--rounds 1] [--sizes 8m 35m 150m]
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from corpora import PFAM_SEQUENCES, like_pfam
from measure import ROOT, SHAPES, peak_bytes, record
from ranks import config_of, start, train

from megaprot.common.packing_plan import plan_epoch
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.corpus import CorpusWriter

LENGTHS = (64, 256, 512, 1024, 2048)
CORPORA = (10_000, 100_000, 1_000_000, 10_000_000, PFAM_SEQUENCES)
PROCESSES = (1, 2, 4)
ROW_TOKENS = 4096
NUM_RESIDUES = 400_000


def write_corpus(folder: Path, length: int) -> None:
    """Write random sequences of one length, as training and validation part."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, number in (("valid", 10), ("train", NUM_RESIDUES // length)):
        writer = CorpusWriter(folder / split, get_vocabulary("esm"))
        for _ in range(number):
            writer.add(generator.integers(4, 24, length, dtype=np.uint8))
        writer.finish({})


def plan(num_sequences: int, results: Path) -> None:
    """Be a process that plans an epoch of a corpus, and leave what it has spent."""
    lengths = like_pfam(num_sequences)
    plan_epoch(lengths[:1000], 2048, 1024, 2, 0, 0)
    started = time.process_time()
    plan_epoch(lengths, 2048, 1024, 2, 0, 0)
    spent = time.process_time() - started
    results.write_text(json.dumps({"seconds": spent, "megabytes": peak_bytes() / 1e6}))


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
    options.add_argument("--steps", type=int, default=1)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--sizes", nargs="+", choices=SHAPES, default=["8m", "35m"])
    for name in ("results", "corpus"):
        options.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    for name in ("sequences", "rows"):
        options.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.shape:
        train(config_of(given.shape, given.corpus, ROW_TOKENS, ROW_TOKENS, given.rows), 1, given.steps, given.results)
        return
    if given.sequences:
        plan(given.sequences, given.results)
        return
    tables: dict[str, list[dict[str, Any]]] = {}
    us, mb = "us a residue", "MB a process"
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary), Path(temporary) / "results.json"

        @cache
        def point(shape: str, length: int, num_processes: int = 1, rows: int = 1) -> dict[str, float]:
            corpus = folder / f"of_{length}"
            if not corpus.exists():
                write_corpus(corpus, length - 2)
            about = {"shape": shape, "corpus": corpus, "steps": given.steps, "rows": rows}
            found = [start(__file__, num_processes, results, **about) for _ in range(given.rounds)]
            return {
                us: round(statistics.median(1e6 * one["seconds"] / one["residues"] for one in found)),
                mb: round(statistics.median(one["megabytes"] / num_processes for one in found)),
            }

        tables["sequence length, 8M"] = [{"tokens a sequence": length} | point("8m", length) for length in LENGTHS]
        tables["model size, 256 tokens"] = [{"shape": shape} | point(shape, 256) for shape in given.sizes]
        tables["processes, 8M, 4 rows a step"] = [
            {"processes": str(number)} | point("8m", 256, number, 4) for number in PROCESSES
        ]
        tables["corpus size, plan of an epoch"] = []
        for number in CORPORA:
            found = [start(__file__, 1, results, sequences=number) for _ in range(given.rounds)]
            seconds, megabytes = (statistics.median(one[name] for one in found) for name in ("seconds", "megabytes"))
            row = {"sequences": number, "seconds": round(seconds, 3), "MB": round(megabytes)}
            tables["corpus size, plan of an epoch"].append(row)
    claims = [{"claim": f"cost of training, bf16, one thread a process, by {name}", "rows": rows}
              for name, rows in tables.items()]  # fmt: skip
    record("growth", claims, ["torch", "megatron-core", "numpy", "numba"])
    draw(tables, ROOT / "benchmarks" / "results" / "growth.png")


if __name__ == "__main__":
    main()
