"""Shards: each of n nodes leaves the parts of every n-th unit in a folder, and one process merges them.

A shard's folder is whole or absent, and holds ``shard.json``: what it was made with, which all shards must share.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.files import sync_folder, write_json_atomically

_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})")
_DESCRIPTION = "shard.json"
_MERGED = "merged"  # the folder of complete corpora, until they have been moved out of it


def parse_shard(text: str) -> tuple[int, int]:
    """Return i and n of ``i/n``; raises InputError unless 0 <= i < n."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    number, num_shards = (int(found[1]), int(found[2])) if found else (0, 0)
    if number >= num_shards:
        raise InputError(f"shard is '{text}': give i/n, i counting from 0, such as 0/4, 1/4, 2/4 and 3/4.")
    return number, num_shards


def shard_folder(output: Path, number: int, num_shards: int) -> Path:
    """Return where shard ``number`` of ``num_shards`` is kept."""
    return output / f"shard-{number:05d}-of-{num_shards:05d}"


def is_finished(folder: Path, description: dict[str, Any]) -> bool:
    """Return whether a shard's folder is there, made with the same settings from the same input.

    Raises:
        InputError: where it is there and was made otherwise, or where the corpora are there already.
    """
    if (folder.parent / "train.json").exists():
        raise InputError(f"{folder.parent}: holds corpora already: name another output folder.")
    if not folder.exists():
        return False
    difference = first_difference(read_description(folder), description)
    if difference:
        raise InputError(
            f"{folder}: was made with another '{difference}': remove it, or run the command with what it was made with."
        )
    return True


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write what a shard was made with."""
    write_json_atomically(folder / _DESCRIPTION, description)


def read_description(folder: Path) -> dict[str, Any]:
    """Return what a shard was made with; raises InputError where that cannot be told."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: is no whole shard ({error}): remove it and run that shard again.") from None
    if not isinstance(description, dict):
        raise InputError(f"{folder / _DESCRIPTION}: is damaged: remove the shard's folder and run that shard again.")
    return description


def find_shards(output: Path) -> list[Path]:
    """Return the folders of all shards in ``output``, in order; raises InputError where one is missing."""
    found = {}
    for folder in sorted(output.iterdir()) if output.is_dir() else []:
        match = _NAME.fullmatch(folder.name)
        if match:
            found[int(match[1]), int(match[2])] = folder
    counts = sorted({num_shards for _, num_shards in found})
    if not counts:
        raise InputError(f"{output}: holds no shards: run `megaprot preprocess --shard i/n` for every i first.")
    if len(counts) > 1:
        raise InputError(
            f"{output}: holds shards of {counts[0]} and of {counts[1]}: remove the folders of the number not meant."
        )
    missing = [number for number in range(counts[0]) if (number, counts[0]) not in found]
    if missing:
        named = ", ".join(f"{number}/{counts[0]}" for number in missing)
        raise InputError(f"{output}: has no shard {named}: run `megaprot preprocess --shard` for it, then merge.")
    return list(found.values())


def common_description(shards: list[Path]) -> dict[str, Any]:
    """Return what all shards were made with; raises InputError where one differs from the first."""
    first = read_description(shards[0])
    for shard in shards[1:]:
        difference = first_difference(read_description(shard), first)
        if difference:
            raise InputError(
                f"{shard}: was made with another '{difference}' than {shards[0].name}: make one of them anew."
            )
    return first


def part_folders(shards: list[Path], num_units: int) -> list[Path]:
    """Return the folders of all parts in the order of units; raises InputError where one is missing."""
    folders = sorted((folder for shard in shards for folder in shard.glob("part-*")), key=lambda folder: folder.name)
    if [folder.name for folder in folders] != [f"part-{number:06d}" for number in range(num_units)]:
        raise InputError(f"{shards[0].parent}: parts are missing in its shards: remove the shards and run all again.")
    return folders


def first_difference(one: Any, other: Any, name: str = "") -> str:
    """Return the dotted name of the first key in which two trees of plain values differ, or ""."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                return f"{name}{key}"
            difference = first_difference(one[key], other[key], f"{name}{key}.")
            if difference:
                return difference
        return ""
    return "" if one == other else name.rstrip(".")


def merged_folder(output: Path) -> Path:
    """Return the folder in which complete corpora appear before they take their place."""
    return output / _MERGED


def take_place(output: Path) -> bool:
    """Move complete corpora out of their folder, manifests last, and remove the shards; return whether there are any.

    A killed move is continued by the next call: a folder without ``train.json`` is refused as a corpus.
    """
    merged = merged_folder(output)
    if merged.is_dir():
        last = {".json": 1}
        for path in sorted(merged.iterdir(), key=lambda path: (last.get(path.suffix, 0), path.name == "train.json")):
            path.replace(output / path.name)
        sync_folder(output)
        merged.rmdir()
    if not (output / "train.json").exists():
        return False
    for folder in output.iterdir():
        if _NAME.fullmatch(folder.name):
            shutil.rmtree(folder)
    return True
