"""Start a command in several processes on this machine: ``megaprot launch local --nproc 4 -- pretrain ...``.

The command first checks its configuration and data for that many processes in a single one, so that wrong input is one
sentence and exit status 2 before anything is spawned. Then this process watches over its ranks (see ``supervisor``).
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping
from typing import NoReturn

from megaprot.launch.binding import available_cpus
from megaprot.launch.commands import asks_only, check_arguments, program, require_launchable
from megaprot.launch.options import Parser, number, split_at_dashes
from megaprot.launch.supervisor import Node, Signals, run_ranks

_EPILOG = """\
example: megaprot launch local --nproc 4 -- pretrain --config esm2_8m --parallel.tensor 2 --parallel.pipeline 2

Exit status: 0 done, or saved after a signal; 2 wrong input; else that of the rank that failed first, or 128 + the
number of the signal that ended the ranks. Signals sent to the launcher (TERM, INT, HUP, USR1) are passed on to all."""


def add_watch_options(parser: Parser) -> None:
    """Add the options of how ranks are watched, which every way to launch has."""
    parser.option("--log_dir", "DIR", "also write each rank's output here, a file a rank", default="")
    parser.option("--grace_seconds", "S", "time to save after a signal (300)", type=number(1), default=300)
    parser.option("--hang_seconds", "S", "longest time without a step (600)", type=number(1), default=600)
    parser.option("--silent_seconds", "S", "longest time without a sign of life (60)", type=number(3), default=60)


def main(argv: list[str]) -> int:
    """Read ``--nproc N [OPTIONS] -- COMMAND ARGUMENTS``, check, run, and return the exit status.

    Wrong arguments exit with status 2 after one sentence.
    """
    parser = Parser(
        prog="megaprot launch local",
        description=(__doc__ or "").split("\n")[0],
        epilog=_EPILOG,
        usage="%(prog)s --nproc N [OPTIONS] -- COMMAND [ARGUMENTS]",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.option("--nproc", "N", "number of processes (ranks) to start", type=number(1), required=True)
    parser.option("--max_restarts", "N", "starts after faults, from the last save (0)", type=number(0), default=0)
    add_watch_options(parser)
    parser.switch("--bind_cores", "give each rank its own share of the cores")
    parser.switch("--dry_run", "print the commands and stop")
    own, command = split_at_dashes(argv)
    options = parser.parse_args(own)
    require_launchable(command)
    if asks_only(command):
        return run_to_end(program(command), dict(os.environ))
    node = Node(
        program(command),
        options.nproc,
        log_folder=options.log_dir,
        bind_cores=options.bind_cores,
        grace_seconds=options.grace_seconds,
        silent_seconds=options.silent_seconds,
        hang_seconds=options.hang_seconds,
    )
    check = program([*command, *check_arguments(options.nproc)])
    added = added_environment(options.nproc, os.environ)
    if options.dry_run:
        assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in added.items())
        print(f"{assignments} {shlex.join(check)}", f"{assignments} {shlex.join(node.command)}", sep="\n")
        return 0
    return start(check, node, os.environ | added, options.max_restarts)


def added_environment(num_local: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables the ranks of a node need beside ``environment``; those for threads may be set there.

    The flight recorder keeps NCCL's last collectives and files them when one times out.
    """
    wanted = {
        "OMP_NUM_THREADS": str(max(1, len(available_cpus()) // num_local)),
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    return {name: value for name, value in wanted.items() if name not in environment} | {"PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(check: list[str], node: Node, environment: dict[str, str], max_restarts: int = 0) -> int:
    """Run ``check``, then the ranks of ``node``, again after faults at most ``max_restarts`` times.

    Returns the exit status: that of the check if it is not 0, else of the last start of the ranks.
    """
    status = run_to_end(check, environment)
    if status:
        return status
    with Signals() as signals:
        for restart in range(max_restarts + 1):
            node = Node(**vars(node) | {"port": free_port()})
            ending = run_ranks(node, environment, signals)
            goes_on = ending.is_fault and restart < max_restarts and not signals.numbers
            if ending.message:
                again = f"; starting again from the last save ({restart + 1} of at most {max_restarts})"
                print(f"megaprot launch: {ending.message}{again if goes_on else ''}", file=sys.stderr, flush=True)
            if not goes_on:
                break
    if ending.is_by_signal and not ending.message:
        print(f"megaprot launch: ended by {signal.Signals(signals.numbers[0]).name}", file=sys.stderr)
    return ending.status


def run_to_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a process and return its exit status; a SIGTERM or Ctrl-C meant for us ends it, too."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    finally:
        process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
