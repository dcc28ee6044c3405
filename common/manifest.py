"""``manifest.json``: size and SHA-256 of every other file of a folder, by which a damaged one is told and named."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megaprot.common.files import sha256_of, write_json_atomically

MANIFEST = "manifest.json"


def sizes_and_checksums(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """Return what a manifest says of files below ``folder``: {name: size and sha256}."""
    return {name: {"num_bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def write_manifest(folder: Path, kind: str, files: dict[str, Any]) -> None:
    """Write the manifest of a folder.

    Args:
        folder: The folder.
        kind: What it holds, such as ``megaprot-checkpoint``.
        files: As :func:`sizes_and_checksums` gives them.
    """
    write_json_atomically(folder / MANIFEST, {"format": kind, "version": 1, "files": files})


def problem_of(folder: Path, parts: Collection[str] = ()) -> str:
    """Return what makes a folder incomplete, naming the file, or an empty string.

    Looks at presence and sizes only; :func:`damaged_file` compares checksums.

    Args:
        folder: The folder.
        parts: Files that it must have.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path, num_bytes, _ = folder / name, entry["num_bytes"], entry["sha256"]
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != num_bytes:
                return f"{path} has {path.stat().st_size} bytes instead of {num_bytes}"
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST} is damaged"
    return "" if set(parts) <= set(files) else f"{folder / MANIFEST} does not list all parts"


def damaged_file(folder: Path, names: Collection[str] = (), share: int = 0, num_shares: int = 1) -> str:
    """Return the first of ``names`` (none: all files) whose checksum is not the manifest's, or an empty string.

    Of the files in alphabetical order only every ``num_shares``-th one is looked at, beginning with ``share``.
    """
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in sorted(names or files)[share::num_shares]:
        if sha256_of(folder / name) != files[name]["sha256"]:
            return str(folder / name)
    return ""
