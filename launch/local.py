"""Start a command in several processes on this machine: ``megaprot launch local --nproc 4 -- pretrain ...``.

The command first checks its configuration and data for that many processes in a single one, so that wrong input is one
sentence and exit status 2 before anything is spawned. Then this process becomes torchrun (see ``ranks``).
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

CHECKED_COMMANDS = ("pretrain", "evaluate")
"""The commands that run in several processes; each takes ``--check_processes N``."""
PROGRAM_MODULE = "megaprot.tools.cli"

_ASKS_ONLY = {"-h", "--help", "--print_config", "--print-config"}  # answered once, not by every rank

_EPILOG = """\
example: megaprot launch local --nproc 4 -- pretrain --config esm2_8m --parallel.tensor 2 --parallel.pipeline 2

Exit status: 0 done; 2 wrong input; else that of the rank that failed first, or 128 + the number of the signal received.
Signals sent to the launcher are passed on to all ranks."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        _fail(f"{message}; megaprot launch --help lists the options")


def main(argv: list[str]) -> int:
    """Read ``local --nproc N [--log_dir DIR] [--dry_run] -- COMMAND ARGUMENTS``, check, and become the run.

    Returns the exit status when it does not come to the run: 0 for ``--dry_run``, else that of the failed check.
    Wrong arguments exit with status 2 after one sentence.
    """
    if not argv or argv[0] not in ("local", "-h", "--help"):
        got = f"not {argv[0]!r}" if argv else "but got none"
        _fail(f"the first argument is where to start the processes: local, {got}")
    own, command = _split_at_dashes(argv[1:] if argv[0] == "local" else argv)
    options = _read_options(own)
    if not command:
        _fail("write the command after --, as in: megaprot launch local --nproc 4 -- pretrain --config esm2_8m")
    if command[0] not in CHECKED_COMMANDS:
        _fail(f"{command[0]!r} does not run in several processes; those that do: {', '.join(CHECKED_COMMANDS)}")
    if _ASKS_ONLY & set(command):
        return _run_to_end([sys.executable, "-m", PROGRAM_MODULE, *command], dict(os.environ))
    check = check_command(options.nproc, PROGRAM_MODULE, command)
    ranks = ranks_command(options.nproc, options.log_dir, PROGRAM_MODULE, command)
    added = added_environment(options.nproc, os.environ)
    if options.dry_run:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
        print(" ".join([*assignments, shlex.join(ranks)]))
        return 0
    return start(check, ranks, os.environ | added)


def check_command(num_processes: int, module: str, command: list[str]) -> list[str]:
    """Return the process that checks ``command`` for ``num_processes`` processes and runs nothing."""
    return [sys.executable, "-m", module, *command, "--check_processes", str(num_processes)]


def ranks_command(num_processes: int, log_dir: Path | None, module: str, command: list[str]) -> list[str]:
    """Return the process that runs ``command`` in ``num_processes`` ranks.

    ``--standalone`` takes a free port by itself, so that two runs on one machine do not meet. With ``log_dir`` each
    rank's output goes to files there as well as to the terminal.
    """
    logs = ["--log-dir", str(log_dir), "--tee", "3"] if log_dir else []
    torchrun = ["megaprot.launch.ranks", "--standalone", "--nproc-per-node", str(num_processes), *logs]
    return [sys.executable, "-m", *torchrun, "-m", module, *command]


def added_environment(num_processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables the ranks need beside ``environment``; OMP_NUM_THREADS and the time-out may be set there.

    torch passes on the signals named in TORCHELASTIC_SIGNALS_TO_HANDLE; since it got an option for them it overwrites
    that variable from the option, whose own variable is PET_SIGNALS_TO_HANDLE: both are set.
    """
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    wanted = {
        "OMP_NUM_THREADS": str(max(1, _num_cores() // num_processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",  # seconds a rank has to save after a signal
    }
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": signals,
        "PET_SIGNALS_TO_HANDLE": signals,
    }
    return {name: value for name, value in wanted.items() if name not in environment} | fixed


def _num_cores() -> int:
    """Return the cores this process may use; macOS only tells how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(check: list[str], ranks: list[str], environment: dict[str, str]) -> int:
    """Run ``check`` and return its exit status if it is not 0; else become ``ranks``, which does not return."""
    status = _run_to_end(check, environment)
    if status == 0:
        os.execve(ranks[0], ranks, environment)
    return status


def _run_to_end(command: list[str], environment: dict[str, str]) -> int:
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


def _split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return what stands before and after the first ``--``."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _read_options(argv: list[str]) -> argparse.Namespace:
    """Return the launcher's own options: nproc (at least 1), log_dir, dry_run."""
    parser = _Parser(
        prog="megaprot launch local",
        description=(__doc__ or "").split("\n")[0],
        epilog=_EPILOG,
        usage="%(prog)s --nproc N [--log_dir DIR] [--dry_run] -- COMMAND [ARGUMENTS]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", metavar="N", help="number of processes (ranks) to start")
    parser.add_argument("--log_dir", "--log-dir", metavar="DIR", type=Path, help="also write each rank's output here")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the shell command and stop")
    options = parser.parse_args(argv)
    if options.nproc is None:
        _fail("--nproc is required: the number of processes to start, as in --nproc 4")
    if not options.nproc.isascii() or not options.nproc.isdigit() or int(options.nproc) < 1:
        _fail(f"--nproc must be a whole number of at least 1, but got {options.nproc!r}")
    options.nproc = int(options.nproc)
    return options


def _fail(sentence: str) -> NoReturn:
    """End with one sentence and exit status 2. (This room imports none of the others, their errors included.)"""
    print(f"megaprot launch: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
