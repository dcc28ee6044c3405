"""The commands that can be launched, and what the launcher must know of them."""

import sys

from megaprot.launch.options import fail

CHECKED_COMMANDS = ("pretrain", "evaluate", "finetune")
"""The commands that run in several processes; each takes ``--check_processes N``."""
RUN_FOLDER_FLAGS = {"pretrain": "run.dir", "finetune": "output"}
"""{command: the flag that names its run folder}, of those that save, leave REQUEUE there and go on by themselves."""
PROGRAM_MODULE = "megaprot.tools.cli"

_ASKS_ONLY = {"-h", "--help", "--print_config", "--print-config"}  # answered once, not by every rank


def require_launchable(command: list[str]) -> None:
    """End with one sentence unless ``command`` (a command's name and its arguments) runs in several processes."""
    if not command:
        fail("write the command after --, as in: megaprot launch local --nproc 4 -- pretrain --config esm2_8m")
    if command[0] not in CHECKED_COMMANDS:
        fail(f"{command[0]!r} does not run in several processes; those that do: {', '.join(CHECKED_COMMANDS)}")


def asks_only(command: list[str]) -> bool:
    """Whether the command would only print its help or configuration."""
    return bool(_ASKS_ONLY & set(command))


def check_arguments(num_processes: int) -> list[str]:
    """Return the arguments that make a command check itself for ``num_processes`` processes and run nothing."""
    return ["--check_processes", str(num_processes)]


def program(command: list[str], module: str = PROGRAM_MODULE, python: str = sys.executable) -> list[str]:
    """Return the words that start ``command`` in one process."""
    return [python, "-m", module, *command]


def value_of(flag: str, command: list[str]) -> str:
    """Return the last value that ``command`` gives the flag ``--flag`` (``-`` and ``_`` read the same), or nothing."""
    value = ""
    for at, word in enumerate(command):
        name, equals, given = word.partition("=")
        if name.removeprefix("--").replace("-", "_") == flag and name.startswith("--"):
            value = given if equals else (command[at + 1] if at + 1 < len(command) else "")
    return value
