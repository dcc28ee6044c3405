"""Pretrain a protein BERT with tensor, pipeline, sequence and data parallelism."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from megaprot.pretrain.config import PretrainConfig

CONFIG = PretrainConfig
RECIPES = Path(__file__).parent / "recipes"


def run(config: PretrainConfig) -> None:
    """Validate ``config`` and train, on every process that ``torchrun`` started (one without it).

    Raises:
        InputError: Configuration, data or checkpoint are wrong (exit status 2).
        RunError: The run failed (exit status 1).
    """
    # megatron-core warns at import of every optional package it does not find; the run's first lines say what is used.
    warnings.filterwarnings("ignore", module="megatron")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megaprot.pretrain import parallel, training, validation

    num_processes = config.check_processes or int(os.environ.get("WORLD_SIZE", "1"))
    corpora = validation.validate(config, num_processes)
    if config.check_processes:
        print(f"configuration and data are valid for {num_processes} processes")
        return
    device = parallel.start_processes(config.run.timeout_minutes)
    try:
        place = parallel.lay_out(config.parallel, device)
        training.train(training.Training(config, *corpora, place))
    finally:
        parallel.stop_processes()


if __name__ == "__main__":
    from megaprot.common.command_line import run_command_module

    sys.exit(run_command_module("megaprot pretrain", sys.modules[__name__], sys.argv[1:]))
