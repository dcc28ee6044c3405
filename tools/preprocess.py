"""``megaprot preprocess``: sequence files to the training, validation and test corpora of one output folder.

Which split a sequence falls into is a pure function of the seed and a key (the sequence itself, its family or its
clan), so that neither the order of the input nor what else is in it matters, and a key never lies in two splits.
"""

import gzip
import hashlib
import sys
import zlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import folder_written_whole, sha256_of
from megaprot.common.sequence_readers import GZIP_MAGIC, FastaReader, Record, stop_at_bad_record
from megaprot.common.vocabulary import BadSequence, get_vocabulary
from megaprot.pretrain.corpus import CorpusWriter

NUM_SHOWN_BAD_RECORDS = 5
PROGRESS_INTERVAL = 4096  # records


@dataclass
class SplitConfig:
    """How sequences are divided.

    Args:
        by: What is kept together: ``random`` the sequence itself (so that exact duplicates never straddle two splits),
            ``family`` its Pfam family, ``clan`` its Pfam clan (its family where that has no clan).
        valid: Fraction of the keys (not of the sequences) for validation; 0 writes no such split.
        test: Fraction of the keys for the test split; 0 writes no such split.
        clans: Pfam-A.clans.tsv, plain or gzip-compressed; needed by ``clan`` and by nothing else.
        seed: Another seed gives another division.
    """

    by: Literal["random", "family", "clan"] = "random"
    valid: float = 0.05
    test: float = 0.0
    clans: str = ""
    seed: int = 1234


@dataclass
class PreprocessConfig:
    """Turn sequence files into a corpus.

    Args:
        input: FASTA files, plain or gzip-compressed; ``-`` is standard input. Pfam-A headers give each its family.
        output: Folder for ``{train,valid,test}.{bin,idx,json}``; must be absent or empty, and appears when complete.
        vocabulary: ``esm`` (ESM-2), ``iupac`` (TAPE) or ``proteinlm``.
        split: How sequences are divided into training, validation and test.
        on_bad_record: ``stop`` ends at the first record that cannot be read; ``skip`` leaves such out and counts them.
    """

    input: list[str]
    output: str
    vocabulary: str = "esm"
    split: SplitConfig = field(default_factory=SplitConfig)
    on_bad_record: Literal["stop", "skip"] = "stop"


CONFIG = PreprocessConfig


class Splitter:
    """Names the split of each record, from the settings alone.

    Raises:
        InputError: for fractions that leave no training split, or a clans table that is missing, unneeded or malformed.
    """

    def __init__(self, config: SplitConfig) -> None:
        if config.valid < 0 or config.test < 0 or config.valid + config.test >= 1:
            raise InputError(
                f"split.valid {config.valid} and split.test {config.test} leave nothing to train on: "
                "give fractions from 0 that add up to less than 1."
            )
        if (config.by == "clan") != bool(config.clans):
            raise InputError("split.by clan and split.clans Pfam-A.clans.tsv need each other: give both or neither.")
        self.config = config
        self.clan_of_family = read_clans(Path(config.clans)) if config.clans else {}
        self.unlisted_families: set[str] = set()
        self._hash_key = str(config.seed).encode()

    @property
    def names(self) -> list[str]:
        """Return the splits that were asked for."""
        asked = {"train": 1.0, "valid": self.config.valid, "test": self.config.test}
        return [name for name, fraction in asked.items() if fraction > 0]

    def key(self, family: str, residues: bytes) -> bytes:
        """Return what decides a sequence's split; raises BadSequence for one without the family that is needed."""
        if self.config.by == "random":
            return residues
        if not family:
            raise BadSequence(f"names no Pfam family, which split.by {self.config.by} needs")
        if self.config.by == "clan" and family not in self.clan_of_family:
            self.unlisted_families.add(family)
        return (self.clan_of_family.get(family, "") or family).encode()

    def assign(self, key: bytes) -> str:
        """Return the split of a key: the hash of seed and key, as a number in [0, 1), against the fractions."""
        digest = hashlib.blake2b(key, digest_size=8, key=self._hash_key).digest()
        number = int.from_bytes(digest, "big") / 2**64
        if number < self.config.valid:
            return "valid"
        return "test" if number < self.config.valid + self.config.test else "train"

    def settings(self) -> dict[str, Any]:
        """Return the settings for the manifest, the checksum of the clans table among them."""
        checksum = {"clans_sha256": sha256_of(Path(self.config.clans))} if self.config.clans else {}
        return asdict(self.config) | checksum


def read_clans(path: Path) -> dict[str, str]:
    """Return {family accession: clan accession, or "" for none} from Pfam's table of clans (tab-separated)."""
    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content).decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): give Pfam's table Pfam-A.clans.tsv.") from None
    clans = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 2 or not fields[0].startswith("PF"):
            raise InputError(f"{path}:{number}: is not 'family<TAB>clan<TAB>...': give Pfam's table Pfam-A.clans.tsv.")
        clans[fields[0]] = fields[1]
    return clans


class BadRecords:
    """Stops at the first bad record or, when told to skip, counts all and shows the first few on standard error."""

    def __init__(self, on_bad_record: str) -> None:
        self.is_stopping = on_bad_record == "stop"
        self.num_skipped = 0

    def report(self, message: str) -> None:
        """Take note of one bad record; raises InputError when stopping."""
        if self.is_stopping:
            stop_at_bad_record(message)
        self.num_skipped += 1
        if self.num_skipped <= NUM_SHOWN_BAD_RECORDS:
            print(f"skipped: {message}", file=sys.stderr)


def run(config: PreprocessConfig) -> None:
    """Write the corpora and print a summary; see :class:`PreprocessConfig`.

    Raises:
        InputError: for wrong settings or input; RunError where the output cannot be written. Neither leaves a folder.
    """
    vocabulary = get_vocabulary(config.vocabulary)
    splitter = Splitter(config.split)
    _check_inputs(config.input)
    bad_records = BadRecords(config.on_bad_record)
    output = Path(config.output)
    try:
        with folder_written_whole(output) as partial, ExitStack() as stack:
            writers = {name: CorpusWriter(partial / name, vocabulary) for name in splitter.names}
            for writer in writers.values():
                stack.callback(writer.close)
            sources = [_preprocess_source(path, writers, splitter, bad_records) for path in config.input]
            _check_splits(writers, config.split)
            for name, writer in writers.items():
                writer.finish({"sources": sources, "split": {"name": name, **splitter.settings()}})
    except OSError as error:
        raise RunError(
            f"{output}: could not be written ({error.strerror}): make room or choose another folder."
        ) from None
    print(_summary(writers, splitter, bad_records, output))


def _check_inputs(paths: list[str]) -> None:
    if not paths:
        raise InputError("input names no file: give at least one FASTA file.")
    for path in paths:
        if path != "-" and not Path(path).exists():
            raise InputError(f"{path}: is missing: give a FASTA file, or - for standard input.")
    named = Counter("-" if path == "-" else str(Path(path).resolve()) for path in paths)
    for path, num_times in named.items():
        if num_times > 1:
            raise InputError(f"{path}: is named {num_times} times in input: name each file once.")


def _preprocess_source(
    path: str, writers: dict[str, CorpusWriter], splitter: Splitter, bad_records: BadRecords
) -> dict[str, Any]:
    """Divide one file's sequences among the writers; return its entry for the manifest."""
    reader = FastaReader(path, bad_records.report)
    num_kept, num_skipped_before = 0, bad_records.num_skipped
    total = Path(path).stat().st_size if path != "-" else None
    with tqdm(total=total, desc=reader.name, unit="B", unit_scale=True, disable=None) as progress:
        for record in reader:
            try:
                _add(record, writers, splitter)
                num_kept += 1
            except BadSequence as error:
                bad_records.report(f"{reader.where(record.line)}: record '{record.identifier}' {error}")
            if not num_kept % PROGRESS_INTERVAL:
                progress.update(reader.num_bytes - progress.n)
        progress.update(reader.num_bytes - progress.n)
    return {
        "path": path,
        "num_bytes": reader.num_bytes,
        "sha256": reader.sha256,
        "num_sequences": num_kept,
        "num_skipped": bad_records.num_skipped - num_skipped_before,
    }


def _add(record: Record, writers: dict[str, CorpusWriter], splitter: Splitter) -> None:
    vocabulary = writers["train"].vocabulary
    ids, changes = vocabulary.encode(record.sequence)
    family = record.family
    writer = writers[splitter.assign(splitter.key(family, ids.tobytes()))]
    writer.add(ids, family)
    if changes:
        writer.changes.update(changes)


def _check_splits(writers: dict[str, CorpusWriter], config: SplitConfig) -> None:
    """Refuse a split that was asked for and got no sequence."""
    if not any(writer.num_sequences for writer in writers.values()):
        raise InputError("no input file holds a sequence that can be used: see the skipped records above.")
    for name, writer in writers.items():
        if not writer.num_sequences:
            keys = {"random": "sequences", "family": "families", "clan": "clans"}[config.by]
            fraction = "lower split.valid and split.test" if name == "train" else f"raise split.{name}"
            raise InputError(f"split '{name}' got no sequence from so few {keys}: {fraction} or change split.seed.")


def _summary(writers: dict[str, CorpusWriter], splitter: Splitter, bad_records: BadRecords, output: Path) -> str:
    lines = []
    changes: Counter[str] = Counter()
    for name, writer in writers.items():
        mean = writer.num_residues / writer.num_sequences
        lines.append(
            f"{name}: {writer.num_sequences:,} sequences, {writer.num_residues:,} residues, mean length {mean:.1f}"
            + (f", {len(writer.families):,} families" if writer.families else "")
        )
        changes.update(writer.changes)
    if changes:
        lines.append("changed: " + ", ".join(f"{kind} {count:,}" for kind, count in sorted(changes.items())))
    if splitter.unlisted_families:
        lines.append(
            f"families not in the clans table, each taken as its own clan: {len(splitter.unlisted_families):,}"
        )
    if bad_records.num_skipped:
        lines.append(f"skipped: {bad_records.num_skipped:,} bad records")
    return "\n".join([*lines, f"written to {output}"])
