"""Proteins with labels: where a split's file is, and what its records become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns, SequenceReader, open_sequences
from megaprot.common.vocabulary import BadSequence, Vocabulary
from megaprot.finetune.config import LabelConfig
from megaprot.finetune.residues import encode

_SUFFIX = re.compile(r"\.(lmdb|json|jsonl|csv|tsv|parquet)(\.gz|\.zst)?$")
_TRUE = ("true", "1", "yes")


class BadLabel(ValueError):
    """A label that cannot be used; the text is a clause such as ``has 12 labels for 13 residues``."""


@dataclass(frozen=True)
class Example:
    """One protein of a split.

    Attributes:
        number: Its place in the split, from 0.
        record: Its place in the file, from 0.
        identifier: Its name.
        residues: Ids of its residues, uint8 [num_residues].
        sequence: Its letters.
        label: What the task made of its record; empty where none is needed.
    """

    number: int
    record: int
    identifier: str
    residues: NDArray[np.uint8]
    sequence: str
    label: NDArray[Any]


@dataclass(frozen=True)
class Split:
    """A file of labelled proteins, or the rows of a table that belong to one split.

    Attributes:
        path: The file, or folder of an LMDB.
        name: The split.
        is_shared: Whether the file holds other splits too, told apart by its columns ``set`` and ``validation``.
    """

    path: Path
    name: str
    is_shared: bool = False


def find_split(data: Path, folder: str, name: str) -> Split:
    """Return where a split is.

    ``data`` is TAPE's data folder (``secondary_structure/secondary_structure_train.lmdb`` or ``.json``), the task's own
    folder (the same file names, or ``train.csv``), or one table with a column ``set`` as FLIP has it.

    Args:
        data: What the person named.
        folder: Name TAPE has for the task's data.
        name: The split: ``train``, ``valid``, ``test``, ``cb513``, ...

    Raises:
        InputError: There is no such file; the text names the splits there are.
    """
    if data.is_file():
        return Split(data, name, is_shared=True)
    if not data.is_dir():
        raise InputError(f"--data {data} is neither a folder nor a file; name TAPE's data folder or a table.")
    places = [place for place in (data / folder, data) if place.is_dir()]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.iterdir()):
            match = _SUFFIX.search(path.name)
            if match:
                stem = path.name[: match.start()]
                found.setdefault(stem.removeprefix(f"{folder}_"), path)
    if name in found:
        return Split(found[name], name)
    known = ", ".join(sorted(found)) or "no files of labelled proteins at all"
    raise InputError(f"{places[0]} holds no split '{name}' (no {folder}_{name}.lmdb or .json); there are: {known}.")


def read_examples(
    split: Split, labels: LabelConfig, vocabulary: Vocabulary, label_of: Callable[[dict[str, Any], int], NDArray[Any]]
) -> list[Example]:
    """Return all proteins of a split, none left out.

    Args:
        split: Where they are.
        labels: Columns of a table.
        vocabulary: The encoder's.
        label_of: Makes the label of a record and its number of residues; raises BadLabel.

    Raises:
        InputError: A record cannot be used (the text has its number, from 0), or there is none.
    """
    examples: list[Example] = []
    for number, identifier, sequence, record in _records(split, labels):
        place = f"{split.path}, record {number}"
        try:
            residues = encode(vocabulary, sequence.encode("utf-8", "replace"))
            label = label_of(record, len(residues))
        except BadSequence as error:
            raise InputError(f"{place}: its sequence {error}; correct or remove it.") from None
        except BadLabel as error:
            raise InputError(f"{place}: {error}; correct or remove it.") from None
        examples.append(Example(len(examples), number, identifier, residues, sequence, label))
    if not examples:
        raise InputError(f"{split.path} holds no protein of the split '{split.name}'; name another split or file.")
    return examples


def read_unlabelled(path: Path, vocabulary: Vocabulary, columns: Columns) -> Iterator[Example]:
    """Yield the proteins of any sequence file, for prediction.

    Raises:
        InputError: The file or a record cannot be used.
    """
    for number, record in enumerate(open_sequences(path, columns=columns, on_bad_record=_stop)):
        try:
            residues = encode(vocabulary, record.sequence)
        except BadSequence as error:
            raise InputError(f"{path}:{record.line}: {record.identifier} {error}; correct or remove it.") from None
        yield Example(
            number, number, record.identifier, residues, record.sequence.decode("ascii", "replace"), np.empty(0)
        )


def _records(split: Split, labels: LabelConfig) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
    """Yield (number from 0, identifier, sequence, record) of the records of a split."""
    reader = _open(split.path, labels)
    if not hasattr(reader, "records"):
        raise InputError(f"{split.path} holds sequences without labels; give TAPE's LMDB or JSON, or a table.")
    is_table = hasattr(reader, "columns")
    sequence_key = labels.sequence if is_table else "primary"
    identifier_key = labels.identifier if is_table else "id"
    for number, (_, record) in enumerate(reader.records()):
        if not isinstance(record, dict) or not isinstance(record.get(sequence_key), str | bytes):
            raise InputError(f"{split.path}, record {number}: has no text '{sequence_key}'; give the task's own data.")
        if split.is_shared and not _is_of(record, split, number):
            continue
        sequence = record[sequence_key]
        text = sequence.decode("utf-8", "replace") if isinstance(sequence, bytes) else sequence
        yield number, str(record.get(identifier_key, number) if identifier_key else number), text, record


def _open(path: Path, labels: LabelConfig) -> SequenceReader:
    """Return the reader of a split's file; a record that cannot be read at all ends the run."""
    return open_sequences(path, columns=Columns(labels.sequence, labels.identifier), on_bad_record=_stop)


def _stop(message: str) -> None:
    """Raise InputError for a record that cannot be read."""
    raise InputError(f"{message}; correct or remove it.")


def _is_of(record: dict[str, Any], split: Split, number: int) -> bool:
    """Tell whether a row of a table belongs to a split: FLIP marks validation rows among those of ``train``."""
    if "set" not in record:
        raise InputError(f"{split.path} has no column 'set'; add one that says train, valid or test, or give a folder "
                         "with a file a split.")  # fmt: skip
    is_validation = str(record.get("validation") or "").strip().lower() in _TRUE
    name = str(record["set"]).strip().lower()
    if split.name == "valid":
        return name in ("valid", "validation") or (name == "train" and is_validation)
    return name == split.name and not (is_validation and name == "train")
