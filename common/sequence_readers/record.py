"""One record of a sequence file, and what becomes of a bad one."""

import re
from typing import NamedTuple

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY

# Nine digits at most, so that the number fits the int32 of SequenceBlock.families.
PFAM_FAMILY = re.compile(r"(?:^|\s)(PF\d{5,9})(?:\.\d+)?;", re.ASCII)
_ACCESSION = re.compile(rb"PF(\d{5,9})(?:\.\d+)?")


class Record(NamedTuple):
    """One sequence as its file has it: line ends removed, letters untouched; ``line`` is where it begins, from 1."""

    identifier: str
    description: str
    sequence: bytes
    line: int

    @property
    def family(self) -> str:
        """Return the Pfam accession without version, ``PF00067`` of ``... PF00067.25;p450;``, or "" for none."""
        found = PFAM_FAMILY.search(self.description)
        return found.group(1) if found else ""


def stop_at_bad_record(message: str) -> None:
    """Raise InputError with the message of a bad record: what a reader does unless told to skip."""
    raise InputError(f"{message}: correct it, or skip such records with --on_bad_record skip.")


def family_number(accession: bytes) -> int:
    """Return 67 for ``PF00067`` or ``PF00067.25``, NO_FAMILY for anything else."""
    found = _ACCESSION.fullmatch(accession)
    return int(found.group(1)) if found else NO_FAMILY
