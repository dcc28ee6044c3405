"""What tensor, pipeline and sequence parallelism cost on a CPU: processor seconds of all processes against one process.

Summed over processes (benchmarks/ranks.py) it tells what a layout adds: collectives, messages, and work that is done on
every rank alike. Every layout trains the same model on the same rows.
usage: python benchmarks/bench_layouts.py [--shape 8m] [--steps 2] [--rounds 1] [--precision bf16]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from corpora import write_corpora
from measure import SHAPES, record
from ranks import config_of, start, train

from megaprot.pretrain.config import ParallelConfig

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


def main() -> None:
    """Measure all layouts in turn, print and record; or be one process of one."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--shape", choices=SHAPES, default="8m")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    options.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.layout:
        config = config_of(given.shape, given.corpus, 2048, 512, ROWS_A_STEP, given.precision)
        config.parallel = LAYOUTS[given.layout][1]
        train(config, 1, given.steps, given.results)
        return
    costs: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as temporary:
        write_corpora(Path(temporary))
        about = {"shape": given.shape, "steps": given.steps, "precision": given.precision}
        about["corpus"] = Path(temporary) / "pfam"
        for _ in range(given.rounds):
            for name, (num_processes, _) in LAYOUTS.items():
                found = start(__file__, num_processes, Path(temporary) / "results.json", layout=name, **about)
                costs[name].append(1e6 * found["seconds"] / found["residues"])
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
