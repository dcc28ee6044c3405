"""Mutations of one protein of a pair, in PLM-interact's tables or as mutation strings, and what is read of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megaprot.common.errors import InputError
from megaprot.common.mutations import check_wild_type, parse_mutations
from megaprot.common.sequence_readers import Columns
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.batching import centred_window
from megaprot.finetune.pairs.cuts import Span, longest_first
from megaprot.finetune.pairs.files import LABELS, FixedCsv, FixedTsv, ProteinTable, Residues, sequence_name

PARTNER, WILD, MUTANT, SEQUENCE, MUTATION = "participant_sequence", "wild_seq", "mutant_seq", "sequence", "mutation"
NO_LABEL = -1


@dataclass(frozen=True, eq=False, slots=True)
class MutationExample:
    """One mutation and the partner whose binding it may change.

    Attributes:
        number: Its place in the split, from 0; below 0 in the other order.
        record: Its line in the file, from 1.
        identifier: Its mutations as written, or the line.
        wild: Residue ids of the wild type.
        mutant: Residue ids of the mutant.
        partner: Residue ids of the partner.
        label: 1 or 0; -1 where the table has none.
        is_swapped: Whether the partner stands first.
    """

    number: int
    record: int
    identifier: str
    wild: Residues
    mutant: Residues
    partner: Residues
    label: int
    is_swapped: bool = False

    @property
    def num_residues(self) -> int:
        """Residues of mutant and partner."""
        return len(self.mutant) + len(self.partner)


def other_order(example: MutationExample) -> MutationExample:
    """Return the example with its partner first, with a number that no other has."""
    return replace(example, number=-1 - example.number, is_swapped=True)


def read_mutations(path: Path, vocabulary: Vocabulary) -> list[MutationExample]:
    """Return the mutations of a table.

    Args:
        path: CSV or TSV (``.gz`` and ``.zst`` too) with the columns ``wild_seq``, ``mutant_seq`` and
            ``participant_sequence`` (PLM-interact), or ``sequence``, ``mutation`` (``A23T``, several joined by ``:``)
            and ``participant_sequence``; ``label`` may be there.
        vocabulary: The encoder's.

    Raises:
        InputError: A row cannot be used, a mutation does not fit its wild type or changes nothing, or there is none.
    """
    vocabulary.require_per_residue("A mutation")
    proteins = ProteinTable(vocabulary, str(path))
    examples: list[MutationExample] = []
    for line, name, sequences, label in _rows(path):
        place = f"{path}:{line}"
        if label not in LABELS and label:
            raise InputError(f"{place}: the label '{label[:40]}' is neither 0 nor 1; correct it.")
        ids: list[Residues] = []
        for sequence in sequences:
            letters = sequence.encode("utf-8", "replace")
            proteins.add(sequence_name(letters), letters, place)
            ids.append(proteins[sequence_name(letters)])
        if np.array_equal(ids[0], ids[1]):
            raise InputError(f"{place}: mutant and wild type are the same to the encoder; correct or remove the row.")
        number = LABELS[label] if label else NO_LABEL
        examples.append(MutationExample(len(examples), line, name, ids[0], ids[1], ids[2], number))
    if not examples:
        raise InputError(f"{path} holds no mutation; give a table with a row a mutation.")
    return examples


def _rows(path: Path) -> Iterator[tuple[int, str, tuple[str, str, str], str]]:
    """Yield (line, name, (wild type, mutant, partner), label or "") of a table."""

    def stop(message: str) -> None:
        raise InputError(f"{message}; correct or remove it.")

    reader = (FixedTsv if ".tsv" in path.name else FixedCsv)(path, Columns(PARTNER), stop)
    for line, record in reader.records():
        place = f"{path}:{line}"
        needed = (SEQUENCE, MUTATION) if MUTATION in record else (WILD, MUTANT)
        lacking = [name for name in needed if name not in record]
        if lacking:
            raise InputError(f"{path}: has no column '{lacking[0]}'; give {WILD} and {MUTANT}, or {SEQUENCE} and "
                             f"{MUTATION}, beside {PARTNER}.")  # fmt: skip
        cells = {name: "".join(value.split()) for name, value in record.items()}
        wild, name = (cells[SEQUENCE].upper(), cells[MUTATION]) if MUTATION in cells else (cells[WILD].upper(), "")
        mutant = mutated(wild, name, place) if name or MUTATION in cells else cells[MUTANT].upper()
        partner = cells[PARTNER].upper()
        if not wild or not mutant or not partner:
            raise InputError(f"{place}: lacks a sequence; correct or remove the row.")
        yield line, name or f"line {line}", (wild, mutant, partner), cells.get("label", "")


def mutated(wild: str, text: str, place: str) -> str:
    """Return a sequence with mutations such as ``A23T:K40R``; raises InputError where they do not fit it."""
    mutations = parse_mutations(text, place)
    check_wild_type(wild, mutations, SEQUENCE, place)
    letters = list(wild)
    for mutation in mutations:
        letters[mutation.position] = mutation.mutant
    return "".join(letters)


def changed(one: Residues, other: Residues) -> tuple[Span, Span]:
    """Return the part of either sequence that the other does not share, beginning and end taken away."""
    shared = min(len(one), len(other))
    differs = np.flatnonzero(one[:shared] != other[:shared])
    start = int(differs[0]) if len(differs) else shared
    rest = shared - start
    from_end = np.flatnonzero(one[::-1][:rest] != other[::-1][:rest])
    same_end = int(from_end[0]) if len(from_end) else rest
    return (start, len(one) - same_end), (start, len(other) - same_end)


def spans_of(example: MutationExample, budget: int) -> tuple[Span, Span, Span]:
    """Return what is read of wild type, mutant and partner.

    The longer protein is cut first; the mutated one keeps a window with the mutations in its middle, whole in any case,
    the partner its beginning.

    Args:
        example: The mutation.
        budget: Most residues of a pair; 0 for any number.

    Raises:
        InputError: The mutations alone are longer than ``budget``.
    """
    parts = changed(example.wild, example.mutant)
    needed = max(1, *(end - start for start, end in parts))
    longest = max(len(example.wild), len(example.mutant))
    keep, keep_partner = longest_first(longest, len(example.partner), budget)
    if keep < needed:
        if needed >= budget:
            raise InputError(f"the mutations of {example.identifier} span {needed:,} residues and a pair may have "
                             f"{budget:,}; raise --ppi.max_length.")  # fmt: skip
        keep, keep_partner = needed, budget - needed
    wild, mutant = (
        centred_window((start + end) // 2, len(residues), keep)
        for (start, end), residues in zip(parts, (example.wild, example.mutant), strict=True)
    )
    return wild, mutant, (0, keep_partner)
