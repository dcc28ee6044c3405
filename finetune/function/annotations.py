"""Proteins with sequences and Gene Ontology annotations, from CAFA-5's layout or a GAF 2.2 file.

    read_function_data(folder) -> FunctionData       .identifiers, .sequences, .annotated, .labels, .ontology, .counts

A folder holds ``go-basic.obo``, ``train_sequences.fasta`` and either ``train_terms.tsv`` (EntryID, term, aspect) or one
GAF 2.2 file (``*.gaf``); each may be compressed (``.gz``). Nothing is left out without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import read_fasta
from megaprot.common.sequence_readers.source import Source
from megaprot.finetune.function.ontology import ASPECTS, NAMESPACES, Ontology, read_ontology

EVIDENCE = frozenset(["EXP", "IDA", "IPI", "IMP", "IGI", "IEP", "HTP", "HDA", "HMP", "HGI", "HEP", "TAS", "IC"])
"""Evidence codes of a GAF file that count: experiments, and statements of authors and curators, as in CAFA."""
_SUFFIXES = ("", ".gz", ".zst")


@dataclass(frozen=True, eq=False)
class FunctionData:
    """Proteins that have both a sequence and an annotation, in the order of the FASTA file.

    Attributes:
        ontology: The ontology.
        identifiers: Their names [num_proteins].
        sequences: Their letters as the file has them [num_proteins].
        annotated: Terms as annotated, bool [num_proteins, num_terms].
        labels: Terms with all their ancestors, bool [num_proteins, num_terms].
        counts: {what was read, replaced or left out: how many}, in words fit to print.
    """

    ontology: Ontology
    identifiers: tuple[str, ...]
    sequences: tuple[bytes, ...]
    annotated: csr_array
    labels: csr_array
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.identifiers)


def read_function_data(folder: Path, evidence: frozenset[str] = EVIDENCE) -> FunctionData:
    """Read a folder of sequences, annotations and ontology.

    Args:
        folder: The folder.
        evidence: Evidence codes that count, where annotations are a GAF file.

    Raises:
        InputError: A file is missing or cannot be read, or no protein has both a sequence and a term.
    """
    ontology = read_ontology(_found(folder, "go-basic.obo"))
    fasta = _found(folder, "train_sequences.fasta")
    path, is_gaf = _annotation_file(folder)
    counts: Counter[str] = Counter()
    rows = _gaf_rows(path, evidence, counts) if is_gaf else _table_rows(path, counts)
    pairs = list(dict.fromkeys(rows))  # each (protein, term, namespace) once
    counts["annotations"] = len(pairs)
    sequences = _sequences(fasta, counts)
    return _joined(ontology, sequences, pairs, counts, f"{fasta} and {path}")


def _found(folder: Path, name: str) -> Path:
    """Return a file of the folder, plain or compressed."""
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise InputError(f"--data {folder} holds no {name}: name a folder with go-basic.obo, train_sequences.fasta and "
                     "train_terms.tsv (or a GAF file).")  # fmt: skip


def _annotation_file(folder: Path) -> tuple[Path, bool]:
    """Return the file of annotations and whether it is a GAF file; raises InputError where there are several."""
    gaf_files = sorted(path for suffix in _SUFFIXES for path in folder.glob(f"*.gaf{suffix}"))
    if not gaf_files:
        return _found(folder, "train_terms.tsv"), False
    others = [path.name for path in gaf_files[1:]]
    others += [f"train_terms.tsv{suffix}" for suffix in _SUFFIXES if (folder / f"train_terms.tsv{suffix}").is_file()]
    if others:
        raise InputError(f"--data {folder} holds annotations twice, {gaf_files[0].name} and {others[0]}: leave one.")
    return gaf_files[0], True


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and columns of every line that is neither empty nor a comment of a GAF file."""
    with Source(path).content() as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip() and not line.startswith(b"!"):
                yield number, line.decode("utf-8", "replace").rstrip("\r\n").split("\t")


def _table_rows(path: Path, counts: Counter[str]) -> Iterator[tuple[str, str, int]]:
    """Yield (protein, term, namespace) of CAFA-5's table, with or without its header."""
    for number, cells in _lines(path):
        if len(cells) < 3 or cells[2] not in (*ASPECTS, "aspect"):
            raise InputError(f"{path}:{number}: is not 'EntryID<TAB>term<TAB>aspect' with an aspect of "
                             f"{', '.join(ASPECTS)}: correct or remove the line.")  # fmt: skip
        if number > 1 or cells[2] != "aspect":
            counts["lines"] += 1
            yield cells[0], cells[1], ASPECTS.index(cells[2])


def _gaf_rows(path: Path, evidence: frozenset[str], counts: Counter[str]) -> Iterator[tuple[str, str, int]]:
    """Yield (protein, term, namespace) of a GAF 2.x file, but for NOT annotations and other evidence."""
    letters = "PCF"  # of NAMESPACES, in order
    for number, cells in _lines(path):
        if len(cells) < 15 or cells[8] not in tuple(letters):
            raise InputError(f"{path}:{number}: is not a line of a GAF 2.2 file (17 columns, an aspect of P, C or F in "
                             "the 9th): correct or remove it.")  # fmt: skip
        counts["lines"] += 1
        if "NOT" in cells[3].split("|"):
            counts["annotations that say NOT, left out"] += 1
        elif cells[6] not in evidence:
            counts["annotations of other evidence, left out"] += 1
        else:
            yield cells[1], cells[4], letters.index(cells[8])


def _sequences(path: Path, counts: Counter[str]) -> dict[str, bytes]:
    """Return {protein: letters}; ``sp|P12345|NAME_SPECIES`` is P12345. Raises InputError for a protein twice."""
    found: dict[str, bytes] = {}
    bad: list[str] = []
    for record in read_fasta(path, bad.append):
        parts = record.identifier.split("|")
        identifier = parts[1] if len(parts) == 3 else record.identifier
        if identifier in found:
            raise InputError(f"{path}:{record.line}: the protein {identifier} is there twice: remove one.")
        found[identifier] = record.sequence
    counts["sequences"] = len(found)
    counts["records without a sequence or identifier, left out"] = len(bad)
    return found


def _joined(
    ontology: Ontology,
    sequences: dict[str, bytes],
    pairs: list[tuple[str, str, int]],
    counts: Counter[str],
    place: str,
) -> FunctionData:
    """Return the proteins that have a sequence and a term, with what the others were counted."""
    resolved = ontology.resolve(term for _, term, _ in pairs)
    number_of = {identifier: number for number, identifier in enumerate(sequences)}
    proteins = np.array([number_of.get(protein, -1) for protein, _, _ in pairs], dtype=np.int64)
    namespaces = np.array([namespace for _, _, namespace in pairs], dtype=np.int64)
    has_term = resolved.numbers >= 0
    counts["annotations of an alternative or replaced term, put right"] = sum(
        term in resolved.replaced for _, term, _ in pairs
    )
    counts["annotations of an obsolete term, left out"] = resolved.obsolete.total()
    counts["annotations of an unknown term, left out"] = resolved.unknown.total()
    differs = has_term & (ontology.namespaces[resolved.numbers] != namespaces)
    counts["annotations under another namespace than the ontology's, which holds"] = int(differs.sum())
    without = {protein for protein, _, _ in pairs if protein not in number_of}
    counts["proteins without a sequence, left out"] = len(without)
    is_kept = has_term & (proteins >= 0)
    shape = (len(sequences), len(ontology))
    annotated = _boolean(proteins[is_kept], resolved.numbers[is_kept], shape)
    kept = np.flatnonzero(np.diff(annotated.indptr))
    counts["sequences without a term, left out"] = len(sequences) - len(kept)
    if not len(kept):
        raise InputError(f"{place}: no protein has both a sequence and a known term: use the same identifiers in both.")
    names, letters = list(sequences), list(sequences.values())
    annotated = csr_array(annotated[kept])
    counts["proteins"] = len(kept)
    for place_of, aspect in enumerate(NAMESPACES):
        counts[f"proteins with a {aspect.replace('_', ' ')}"] = len(
            np.unique(annotated.nonzero()[0][ontology.namespaces[annotated.indices] == place_of])
        )
    return FunctionData(
        ontology,
        tuple(names[number] for number in kept),
        tuple(letters[number] for number in kept),
        annotated,
        ontology.propagate(annotated),
        dict(counts),
    )


def _boolean(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]) -> csr_array:
    """Return a bool matrix that is true at (rows, columns), each of which may come more than once."""
    found = csr_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=shape)
    found.sum_duplicates()
    found.sort_indices()
    return found
