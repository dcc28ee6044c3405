"""Leaving out what is nearly the same as an excluded sequence, and the report of what was left out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.mmseqs import MmseqsSearch, chosen_method
from megaprot.common.near_identity import Matches, NearIdentityIndex, check_identity
from megaprot.common.sequence_readers import SequenceBlock, open_sequences
from megaprot.common.vocabulary import Vocabulary, get_vocabulary
from megaprot.tools.preprocessing.config import ExcludeConfig
from megaprot.tools.preprocessing.units import check_exists

REPORT_NAME = "excluded.tsv"
REPORT_HEADER = "identifier\tsource\texcluded_by\tidentity\n"


class Search(Protocol):
    """What finds the sequences to leave out."""

    method: str

    def matches(self, letters: NDArray[np.uint8], bounds: NDArray[np.int64]) -> Matches:
        """Return which of the sequences to leave out, and for what."""


@dataclass(frozen=True)
class Excluded:
    """The excluded sequences: ids of the vocabulary ``letters_of`` back to back, bounds, and identifiers."""

    ids: NDArray[np.uint8]
    bounds: NDArray[np.int64]
    identifiers: list[str]
    letters_of: Vocabulary
    identity: float
    method: str

    def search(self) -> Search:
        """Return a new search for sequences that are nearly the same as one of these."""
        if self.method == "mmseqs":
            return MmseqsSearch(self.ids, self.bounds, self.identity, self.letters_of.letter_table)
        return NearIdentityIndex(self.ids, self.bounds, self.identity)

    @property
    def batch_letters(self) -> int:
        """Return how many letters to search at once: the program MMseqs2 takes seconds to start."""
        return 1 << 26 if self.method == "mmseqs" else 0


def residue_vocabulary(vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary of one token a residue in which sequences are compared: the corpus's own if it is one."""
    return vocabulary if vocabulary.is_per_residue else get_vocabulary("esm")


def read_excluded(config: ExcludeConfig, vocabulary: Vocabulary) -> tuple[Excluded, dict[str, Any]]:
    """Return the excluded sequences and what the manifest says about them.

    Raises:
        InputError: for a file that cannot be read, a bad record in one, or an identity out of range.
    """
    letters_of = residue_vocabulary(vocabulary)
    ids: list[NDArray[Any]] = []
    lengths: list[NDArray[np.int64]] = []
    identifiers: list[str] = []
    files = []
    for path in config.files:
        check_exists(path, "auto")
        reader = open_sequences(path, on_bad_record=_stop)
        for block in reader.blocks():
            encoded = letters_of.encode_block(block.letters, block.bounds)
            for record, reason in encoded.bad:
                _stop(f"{reader.where(int(block.lines[record]))}: record '{block.identifier(record)}' {reason}")
            ids.append(encoded.ids)
            lengths.append(np.diff(encoded.bounds))
            identifiers += [block.identifier(int(record)) for record in encoded.kept]
        files.append({"path": path, "num_bytes": reader.num_bytes, "sha256": reader.sha256})
    bounds = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
    method = chosen_method(config.method, check_identity(config.identity))
    excluded = Excluded(np.concatenate(ids), bounds, identifiers, letters_of, config.identity, method)
    used = excluded.search().method if method == "mmseqs" else method  # its version is worth knowing
    return excluded, {"files": files, "identity": config.identity, "method": used}


def _stop(message: str) -> None:
    raise InputError(f"{message}: correct it, since it could not be excluded.")


def batches(blocks: Iterator[SequenceBlock], num_letters: int) -> Iterator[SequenceBlock]:
    """Yield blocks joined until they have ``num_letters`` letters; 0 leaves them as they are."""
    gathered: list[SequenceBlock] = []
    for block in blocks:
        gathered.append(block)
        if sum(int(part.bounds[-1]) for part in gathered) >= num_letters:
            yield _joined(gathered)
            gathered = []
    if gathered:
        yield _joined(gathered)


def _joined(blocks: list[SequenceBlock]) -> SequenceBlock:
    if len(blocks) == 1:
        return blocks[0]
    letter_starts = np.cumsum([0, *(block.bounds[-1] for block in blocks)])
    header_starts = np.cumsum([0, *(len(block.headers) for block in blocks)])
    bounds = [block.bounds[:-1] + start for block, start in zip(blocks, letter_starts, strict=False)]
    return SequenceBlock(
        letters=np.concatenate([block.letters[: block.bounds[-1]] for block in blocks]),
        bounds=np.concatenate([*bounds, letter_starts[-1:]]),
        headers=np.concatenate([block.headers for block in blocks]),
        header_bounds=np.concatenate(
            [block.header_bounds + start for block, start in zip(blocks, header_starts, strict=False)]
        ),
        families=np.concatenate([block.families for block in blocks]),
        lines=np.concatenate([block.lines for block in blocks]),
    )


def write_report(reports: list[Path], path: Path) -> None:
    """Join the reports of parts (lines without a header) and of corpora (with one) under one header."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(REPORT_HEADER)
        for report in reports:
            with open(report, encoding="utf-8") as lines:
                stream.writelines(line for line in lines if line != REPORT_HEADER)
