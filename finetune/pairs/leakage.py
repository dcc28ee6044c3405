"""What a split of pairs shares with those a model was made with: proteins, nearly the same proteins, whole pairs.

A model may know such pairs by heart; see Bernett et al. (Briefings in Bioinformatics 2024), after whom splits without
shared or similar proteins leave most published models near chance. The encoder's own pretraining counts too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.near_identity import NearIdentityIndex
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.pairs.proteins import ProteinIndex, labels_of, unordered
from megaprot.finetune.report import Section

IDENTITY = 0.9
_CARD = "README.md"
_EXCLUSIONS = re.compile(r"^## Exclusions\n+(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
UNRECORDED = "Not recorded."


@dataclass(frozen=True)
class Overlap:
    """What a split shares with another one.

    Attributes:
        num_shared_proteins: Proteins with the same sequence as one there.
        num_similar_proteins: Others that are nearly (90 %) the same as one there, or as a stretch of it.
        num_pairs_both_shared: Pairs of two proteins that are there.
        num_pairs_one_shared: Pairs of which one protein is there.
        num_repeated_pairs: Pairs that are there, in either order.
        num_contradicted_pairs: Of these, with the other label.
    """

    num_shared_proteins: int
    num_similar_proteins: int
    num_pairs_both_shared: int
    num_pairs_one_shared: int
    num_repeated_pairs: int
    num_contradicted_pairs: int


def overlap(examples: Sequence[PairExample], other: Sequence[PairExample]) -> Overlap:
    """Return what a split shares with another one; equal sequences are one protein, whatever their names."""
    index = ProteinIndex()
    places = index.places(examples)
    num_own = len(index.keys)
    others = index.places(other)
    is_shared = np.zeros(len(index.keys), dtype=bool)
    is_shared[np.unique(others)] = True
    num_shared = is_shared[places].sum(axis=1)
    labels = dict(zip(unordered(others).tolist(), labels_of(other).tolist(), strict=True))
    found = [labels.get(pair) for pair in unordered(places).tolist()]
    is_other = [there is not None and there != here for there, here in zip(found, labels_of(examples), strict=True)]
    own = np.flatnonzero(~is_shared[:num_own])
    similar = _num_similar([index.residues[one] for one in own], [index.residues[one] for one in np.unique(others)])
    return Overlap(
        num_shared_proteins=int(is_shared[:num_own].sum()),
        num_similar_proteins=similar,
        num_pairs_both_shared=int((num_shared == 2).sum()),
        num_pairs_one_shared=int((num_shared == 1).sum()),
        num_repeated_pairs=sum(there is not None for there in found),
        num_contradicted_pairs=int(sum(is_other)),
    )


def _num_similar(proteins: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> int:
    """Return how many proteins are nearly the same as one of others."""
    if not proteins or not others:
        return 0
    index = NearIdentityIndex(*_joined(others), IDENTITY)
    return len(index.matches(*_joined(proteins)).queries)


def _joined(proteins: Sequence[NDArray[Any]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.concatenate(proteins).astype(np.uint8), np.cumsum([0, *map(len, proteins)])


@dataclass(frozen=True)
class Repeats:
    """Pairs that a split holds more than once.

    Attributes:
        num_proteins: Proteins of the split, equal sequences as one.
        num_repeated_pairs: Pairs that stand before in the split, in either order.
        num_contradicted_pairs: Of these, with another label than where the pair stands first.
    """

    num_proteins: int
    num_repeated_pairs: int
    num_contradicted_pairs: int


def repeats(examples: Sequence[PairExample]) -> Repeats:
    """Return which pairs a split holds more than once."""
    index = ProteinIndex()
    pairs, labels = unordered(index.places(examples)), labels_of(examples)
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    is_first = first[inverse] == np.arange(len(pairs))
    is_other = labels != labels[first][inverse]
    return Repeats(len(index.keys), int((~is_first).sum()), int(is_other.sum()))


def pretraining_exclusions(encoder: Path) -> str:
    """Return what an encoder's model card says was left out of its pretraining."""
    try:
        card = (encoder / _CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return UNRECORDED
    found = _EXCLUSIONS.search(card)
    return " ".join(found[1].split()) if found and found[1].strip() else UNRECORDED


def leakage_section(
    examples: Sequence[PairExample], others: dict[str, Sequence[PairExample]], absent: dict[str, str], pretraining: str
) -> Section:
    """Return the report's part on leakage.

    Args:
        examples: The split that is measured.
        others: Splits the model was made with.
        absent: {split: why it could not be looked at}.
        pretraining: What the encoder's pretraining left out.
    """
    within = repeats(examples)
    found = {name: overlap(examples, other) for name, other in others.items()}
    total = len(examples)
    rows = [
        _row("pairs that the split repeats", within.num_repeated_pairs, total),
        _row("of these with another label", within.num_contradicted_pairs, total),
    ]
    for name, one in found.items():
        proteins = within.num_proteins
        rows += [
            _row(f"proteins that are in {name} too", one.num_shared_proteins, proteins),
            _row(f"other proteins nearly the same (90 %) as one in {name}", one.num_similar_proteins, proteins),
            _row(f"pairs with both proteins in {name}", one.num_pairs_both_shared, total),
            _row(f"pairs with one protein in {name}", one.num_pairs_one_shared, total),
            _row(f"pairs that are in {name} too, in either order", one.num_repeated_pairs, total),
            _row("of these with the other label", one.num_contradicted_pairs, total),
        ]
    notes = [f"{total:,} pairs of {within.num_proteins:,} proteins; equal sequences are one protein."]
    notes += [f"Not compared with {name}: {why}." for name, why in absent.items()]
    notes.append(f"The encoder's pretraining, by its model card: {pretraining}")
    numbers = {
        "within": asdict(within),
        **{name: asdict(one) for name, one in found.items()},
        "not_compared": absent,
        "pretraining": pretraining,
    }
    return Section("leakage", "Leakage", ("what", "number", "share"), rows, notes, numbers)


def _row(what: str, number: int, whole: int) -> tuple[str, str, str]:
    return what, f"{number:,}", f"{number / whole:.1%}"
