"""How long training stands still for a checkpoint: written at once, and in the background.

A run of the ESM-2 8M shape on one process; a save has weights, fp32 copies and both moments. Standing still is the time
in which no step is taken: of a background save its begin and its finish, not what lies between, where steps are slower:
what a save costs in all is the time from its begin to its end less that of as many steps without. Shares are those
of a run that saves each 1,000 steps of one row of 4,096 tokens.
usage: python benchmarks/bench_saves.py [--shape 8m] [--rounds 5]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from corpora import write_corpora
from measure import SHAPES, record
from ranks import config_of

from megaprot.pretrain import parallel
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.training import Training

INTERVAL = 1000


def measure(shape: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Take steps and saves in turn; return seconds of each kind."""
    write_corpora(folder)
    config = config_of(shape, folder / "pfam", 4096, 1024)
    config.train.keep_checkpoints = 1
    seconds: dict[str, list[float]] = {"step": [], "at once": [], "in the background": [], "its cost in all": []}
    with parallel.processes(config.parallel, 5.0) as place:
        training = Training(config, open_blend(config.data), place)
        steps = training.steps()

        def timed(action: Any) -> float:
            started = time.perf_counter()
            action()
            return time.perf_counter() - started

        def take() -> None:
            step, rows, _ = next(steps)
            training.take_step(step, rows, [0.0])

        take()
        for number in range(1, rounds + 1):
            seconds["step"] += [timed(take), timed(take)]
            training.state.step, training.config.train.background_saves = 2 * number, False
            seconds["at once"].append(timed(training.save))
            training.state.step, training.config.train.background_saves = 2 * number + 1, True
            started = time.perf_counter()
            still = timed(training.save)
            num_steps = 0
            while not training.has_written:
                take()
                num_steps += 1
            seconds["in the background"].append(still + timed(training.finish_save))
            passed = time.perf_counter() - started
            seconds["its cost in all"].append(passed - num_steps * statistics.median(seconds["step"]))
        saved = sum(path.stat().st_size for path in training.checkpoints.rglob("*") if path.is_file())
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "claim": f"seconds without a step for a save, ESM-2 {shape} shape: under 1 % at a save each {INTERVAL} steps",
        "megabytes": round(saved / 1e6),
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "rounds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "share_of_training": {
            name: round(middle[name] / (INTERVAL * middle["step"]), 6)
            for name in ("at once", "in the background", "its cost in all")
        },
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8m")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.shape, options.rounds, Path(folder))
    record("saves", [found], ["torch", "megatron-core"])


if __name__ == "__main__":
    main()
