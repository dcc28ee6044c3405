"""Pretrain a protein BERT with tensor, pipeline, sequence and data parallelism."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from megaprot.common import heartbeat
from megaprot.common.errors import InputError, LostPeersError, RunError
from megaprot.common.quiet import quiet
from megaprot.pretrain.config import PretrainConfig

CONFIG = PretrainConfig
RECIPES = Path(__file__).parent / "recipes"


def run(config: PretrainConfig) -> None:
    """Validate ``config`` and train, on every process that ``torchrun`` started (one without it).

    Raises:
        InputError: Configuration, data or checkpoint are wrong (exit status 2).
        RunError: The run failed (exit status 1).
    """
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
    is_watched = heartbeat.start()
    try:
        with parallel.processes(config.parallel, config.run.timeout_minutes) as place:
            training.train(training.Training(config, blend, place))
    except LostPeersError:
        if is_watched:  # the launcher names the cause: one message, not one a victim
            raise SystemExit(LostPeersError.exit_status) from None
        raise
    except (InputError, RunError):
        heartbeat.mark(heartbeat.GAVE_UP)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        heartbeat.mark(heartbeat.GAVE_UP)
        named = error.filename or config.run.dir
        raise RunError(f"{named} cannot be written ({error.strerror}); free the disk and start again.") from error


if __name__ == "__main__":
    from megaprot.common.command_line import run_command_module

    sys.exit(run_command_module("megaprot pretrain", sys.modules[__name__], sys.argv[1:]))
