"""The units of work: each input file, large plain FASTA files cut into ranges of bytes.

The cut is by size alone, so that neither the number of workers nor of shards changes a unit, or their order.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError

UNIT_BYTES = 1 << 28
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Unit:
    """One piece of work: number ``source`` of the inputs, whole, or the records that begin in a range of its bytes.

    ``is_checksum``: only its checksum is asked for, which readers of ranges cannot tell.
    """

    number: int
    source: int
    path: str
    byte_range: tuple[int, int] | None = None
    is_checksum: bool = False

    @property
    def folder_name(self) -> str:
        """Return the name of the folder that the unit's part is written to."""
        return f"part-{self.number:06d}"


def check_inputs(paths: list[str], format: str) -> None:
    """Raise InputError for no input, one that is missing or cannot be read twice, or one named twice."""
    if not paths:
        raise InputError("input names no file: give at least one sequence file.")
    for path in paths:
        check_exists(path, format)
    named = Counter(path if path == STANDARD_INPUT else str(Path(path).resolve()) for path in paths)
    for path, num_times in named.items():
        if num_times > 1:
            raise InputError(f"{path}: is named {num_times} times in input: name each file once.")


def check_exists(path: str, format: str) -> None:
    """Raise InputError for a missing file, and for a pipe if its format is to be told by a first look at it."""
    if path == STANDARD_INPUT:
        return
    if not Path(path).exists():
        raise InputError(f"{path}: is missing: give a sequence file, or - for standard input.")
    if format == "auto" and not (Path(path).is_file() or Path(path).is_dir()):
        raise InputError(f"{path}: is a pipe, which can be read only once: give --format too, or - for standard input.")


def plan_units(paths: list[str], format: str) -> list[Unit]:
    """Return the units of all inputs, in the order of the corpora's sequences."""
    units: list[Unit] = []
    for source, path in enumerate(paths):
        size = num_bytes(path)
        if size <= UNIT_BYTES or format not in ("auto", "fasta") or not _is_plain_fasta(path):
            units.append(Unit(len(units), source, path))
            continue
        units.append(Unit(len(units), source, path, is_checksum=True))
        for start in range(0, size, UNIT_BYTES):
            units.append(Unit(len(units), source, path, (start, min(start + UNIT_BYTES, size))))
    return units


def describe_sources(paths: list[str]) -> list[dict[str, Any]]:
    """Return path, bytes and time of change of each input: what tells that one was changed."""
    return [
        {
            "path": path,
            "num_bytes": num_bytes(path),
            "changed_at": int(max((file.stat().st_mtime for file in _files(path)), default=0)),
        }
        for path in paths
        if path != STANDARD_INPUT
    ]


def num_bytes(path: str) -> int:
    """Return the size of an input, of a folder that of its files; 0 for standard input."""
    return sum(file.stat().st_size for file in _files(path)) if path != STANDARD_INPUT else 0


def _files(path: str) -> list[Path]:
    """Return the file, or those in the folder of an LMDB but for its lock, which readers change."""
    if not Path(path).is_dir():
        return [Path(path)]
    return [file for file in Path(path).iterdir() if file.is_file() and file.name != "lock.mdb"]


def _is_plain_fasta(path: str) -> bool:
    if not Path(path).is_file():
        return False
    try:
        with open(path, "rb") as stream:
            return stream.read(1) == b">"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give a readable sequence file.") from None
