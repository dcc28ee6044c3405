"""Pretrain a protein BERT with tensor, pipeline, sequence and data parallelism."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megaprot.common.errors import InputError
from megaprot.common.quiet import quiet
from megaprot.common.watched import watched
from megaprot.pretrain.config import PretrainConfig

CONFIG = PretrainConfig
RECIPES = Path(__file__).parent / "recipes"
# Read when torch is loaded. Threads of torch's OpenMP spin for milliseconds after each operator, on the very cores that
# the kernels of pretrain/model/cpu_threads.py need next; so many turns are some microseconds.
OPENMP = {"GOMP_SPINCOUNT": "100"}


def run(config: PretrainConfig) -> None:
    """Validate ``config`` and train, on every process that ``torchrun`` started (one without it).

    Raises:
        InputError: Configuration, data or checkpoint are wrong (exit status 2).
        RunError: The run failed (exit status 1).
    """
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)
    quiet("megatron")
    quiet("torch.distributed")  # names of collectives that megatron-core still uses are deprecated there
    from megaprot.pretrain import parallel, training, validation

    if config.check_processes < 0:
        raise InputError(f"check_processes is {config.check_processes}; give the number of processes.")
    num_processes = config.check_processes or int(os.environ.get("WORLD_SIZE", "1"))
    blend = validation.validate(config, num_processes)
    if config.check_processes:
        print(f"configuration and data are valid for {num_processes} processes")
        return
    with watched(config.run.dir), parallel.processes(config.parallel, config.run.timeout_minutes) as place:
        training.train(training.Training(config, blend, place))


if __name__ == "__main__":
    from megaprot.common.command_line import run_command_module

    sys.exit(run_command_module("megaprot pretrain", sys.modules[__name__], sys.argv[1:]))
