"""A folder of parts beside an output: a killed run goes on from there, if it was begun with the same settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically

SETTINGS = "settings.json"


def part_folder(output: Path) -> Path:
    """Return where the parts of an output are until it is whole."""
    return output.with_name(f".{output.name}.partial")


def begin_parts(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or make sure that what a killed run left there was made with the same settings.

    Raises:
        InputError: It was not; the text names the first that differs.
    """
    path = folder / SETTINGS
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if found.get(name) != value:
                raise InputError(f"{folder} was begun with {name} {found.get(name)}, not {value}; go on with that, or "
                                 "remove the folder.")  # fmt: skip
        return
    try:
        folder.mkdir(exist_ok=True)
        write_json_atomically(path, dict(settings))
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be written to ({error.strerror}); choose another.") from None
