"""Mutations as the field writes them: ``A23T``, several joined by ``:``, positions from 1."""

from __future__ import annotations

import re
from typing import NamedTuple

from megaprot.common.errors import InputError

_MUTATION = re.compile(r"([A-Za-z])(\d+)([A-Za-z])", re.ASCII)


class Mutation(NamedTuple):
    """One substitution; ``position`` counts from 0."""

    wild_type: str
    position: int
    mutant: str

    def __str__(self) -> str:
        return f"{self.wild_type}{self.position + 1}{self.mutant}"


def parse_mutations(text: str, place: str) -> tuple[Mutation, ...]:
    """Return the mutations of ``A23T:K40R``.

    Args:
        text: The mutations.
        place: ``FILE:LINE``, for messages.

    Raises:
        InputError: It is not of that form, or changes a position twice.
    """
    mutations = []
    for part in text.strip().split(":"):
        found = _MUTATION.fullmatch(part.strip())
        if not found or int(found[2]) == 0:
            raise InputError(f"{place}: {part.strip()!r} is no substitution such as A23T, counted from 1; correct it.")
        mutations.append(Mutation(found[1].upper(), int(found[2]) - 1, found[3].upper()))
    if len({mutation.position for mutation in mutations}) < len(mutations):
        raise InputError(f"{place}: {text} changes a position twice; correct it.")
    return tuple(mutations)


def check_wild_type(sequence: str, mutations: tuple[Mutation, ...], name: str, place: str) -> None:
    """Raise InputError where a mutation's wild-type letter is not the one that ``sequence``, called ``name``, has."""
    for mutation in mutations:
        _require(sequence, mutation.position, mutation.wild_type, mutation, name, place)


def undo(sequence: str, mutations: tuple[Mutation, ...], place: str) -> str:
    """Return the wild type of a mutated sequence.

    Raises:
        InputError: The sequence does not have a mutation's new letter.
    """
    letters = list(sequence)
    for mutation in mutations:
        _require(sequence, mutation.position, mutation.mutant, mutation, "mutated_sequence", place)
        letters[mutation.position] = mutation.wild_type
    return "".join(letters)


def _require(sequence: str, position: int, letter: str, mutation: Mutation, name: str, place: str) -> None:
    if position >= len(sequence):
        raise InputError(f"{place}: {mutation} lies behind the end of {name}, which has {len(sequence)} residues; "
                         "correct it.")  # fmt: skip
    if sequence[position] != letter:
        raise InputError(f"{place}: {mutation} needs {letter} at position {position + 1}, but {name} has "
                         f"{sequence[position]} there; correct it.")  # fmt: skip
