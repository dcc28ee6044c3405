"""Reading the launcher's own arguments, and refusing them in one sentence."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage; ``_`` and ``-`` read the same in flags."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        fail(f"{message}; {self.prog} --help lists the options")

    def option(self, name: str, metavar: str, text: str, **more: Any) -> None:
        """Add the option ``--name_of_words`` and its spelling with dashes."""
        self.add_argument(*_spellings(name), metavar=metavar, help=text, **more)

    def switch(self, name: str, text: str) -> None:
        """Add the option ``--name_of_words``, which takes no value, and its spelling with dashes."""
        self.add_argument(*_spellings(name), action="store_true", help=text)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((name, "--" + name[2:].replace("_", "-"))))


def number(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers of at least ``least``, for argparse."""

    def read(text: str) -> int:
        if not text.isascii() or not text.removeprefix("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, but got {text!r}")
        return int(text)

    return read


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return what stands before and after the first ``--``."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def existing_folder_of(path: Path) -> Path:
    """Return the nearest folder above ``path``, itself included, that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def fail(sentence: str) -> NoReturn:
    """End with one sentence and exit status 2. (This room imports none of the others, their errors included.)"""
    print(f"megaprot launch: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
