"""Filling the scripts in ``launch/slurm``: every ``{{name}}`` is replaced, and nothing else is touched."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaprot.launch.options import fail

FOLDER = Path(__file__).parent / "slurm"
COMMON = "supervise"
"""The part that all scripts end with: its file fills ``{{supervise}}``."""

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def fill(template: Path, values: Mapping[str, str]) -> str:
    """Return the template with every ``{{name}}`` filled; a line that only holds an empty value is left out.

    Ends with one sentence for a file that cannot be read or a name that is not among ``values``.
    """
    known = {**values, COMMON: (FOLDER / f"{COMMON}.sh").read_text(encoding="utf-8").rstrip("\n")}
    try:
        lines = template.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"the template {template} cannot be read ({error}); name a text file, or leave --template out")
    filled = []
    for number, line in enumerate(lines, 1):
        for name in _PLACE.findall(line):
            if name not in known:
                fail(f"{template} line {number} has {{{{{name}}}}}, which is not filled; known are {', '.join(known)}")
        text = _PLACE.sub(lambda place: known[place[1]], line)
        if text or not _PLACE.search(line):
            filled.append(text)
    return "\n".join(filled) + "\n"


def words(items: Sequence[str]) -> str:
    """Return the words as a shell reads them back."""
    return " ".join(map(shlex.quote, items))
