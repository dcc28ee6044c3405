"""The leakage report on pairs made by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.pairs.leakage import UNRECORDED, leakage_section, overlap, pretraining_exclusions, repeats
from megaprot.finetune.residues import encode
from tests.finetune.folders import random_proteins

ESM = get_vocabulary("esm")
PROTEINS = random_proteins([80, 90, 100, 110, 120], 4)
NEAR = PROTEINS[0][:40] + b"W" + PROTEINS[0][41:]  # one residue of 80 changed
CUT = PROTEINS[1][10:70]  # a stretch of another


def pairs_of(members: Sequence[tuple[bytes, bytes, int]]) -> list[PairExample]:
    """Pairs of sequences; names say nothing."""
    return [
        PairExample(number, number, f"a{number}", f"b{number}", encode(ESM, first), encode(ESM, second), label)
        for number, (first, second, label) in enumerate(members)
    ]


def test_shared_and_similar_proteins_and_repeated_pairs_are_counted() -> None:
    train = pairs_of([(PROTEINS[0], PROTEINS[1], 1), (PROTEINS[1], PROTEINS[2], 0)])
    test = pairs_of([
        (PROTEINS[1], PROTEINS[0], 1),  # a pair of training in the other order
        (PROTEINS[2], PROTEINS[1], 1),  # one with the other label
        (PROTEINS[2], PROTEINS[3], 0),  # one protein is known
        (NEAR, CUT, 1),  # both are nearly known
        (PROTEINS[3], PROTEINS[4], 0),
    ])  # fmt: skip
    found = overlap(test, train)
    assert (found.num_shared_proteins, found.num_similar_proteins) == (3, 2)
    assert (found.num_pairs_both_shared, found.num_pairs_one_shared) == (2, 1)
    assert (found.num_repeated_pairs, found.num_contradicted_pairs) == (2, 1)


def test_splits_without_a_common_protein_share_nothing() -> None:
    test = pairs_of([(PROTEINS[0], PROTEINS[1], 1)])
    train = pairs_of([(PROTEINS[2], PROTEINS[3], 0), (PROTEINS[3], PROTEINS[4], 1)])
    assert set(vars(overlap(test, train)).values()) == {0}


def test_a_naive_count_agrees_on_random_pairs() -> None:
    random = np.random.default_rng(0)
    proteins = random_proteins([30] * 12, 1)
    members = [random.integers(low, low + 8, (40, 2)) for low in (0, 4)]
    drawn = [[(proteins[one], proteins[other], int(random.integers(2))) for one, other in some] for some in members]
    found = overlap(pairs_of(drawn[0]), pairs_of(drawn[1]))
    there = {frozenset((one, other)): label for one, other, label in drawn[1]}  # the last of repeated ones
    known = {protein for pair in drawn[1] for protein in pair[:2]}
    assert found.num_shared_proteins == len({protein for pair in drawn[0] for protein in pair[:2]} & known)
    assert found.num_repeated_pairs == sum(frozenset(pair[:2]) in there for pair in drawn[0])
    assert found.num_contradicted_pairs == sum(there.get(frozenset(pair[:2]), pair[2]) != pair[2] for pair in drawn[0])
    assert found.num_pairs_both_shared == sum(pair[0] in known and pair[1] in known for pair in drawn[0])


def test_repetitions_within_a_split() -> None:
    found = repeats(pairs_of([
        (PROTEINS[0], PROTEINS[1], 1), (PROTEINS[1], PROTEINS[0], 1), (PROTEINS[0], PROTEINS[1], 0),
        (PROTEINS[0], PROTEINS[2], 0),
    ]))  # fmt: skip
    assert (found.num_proteins, found.num_repeated_pairs, found.num_contradicted_pairs) == (3, 2, 1)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# A\n\n## Exclusions\n\nLeft out: 5 sequences\nlike those of test.fasta.\n\n## Licence\n\nMIT\n",
         "Left out: 5 sequences like those of test.fasta."),
        ("# A\n\n## Exclusions\n\n## Licence\n", UNRECORDED),
        ("# A\n", UNRECORDED),
        (None, UNRECORDED),
    ],
)  # fmt: skip
def test_the_model_card_says_what_pretraining_left_out(card: str | None, expected: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert pretraining_exclusions(tmp_path) == expected


def test_the_section_says_what_was_not_compared() -> None:
    test = pairs_of([(PROTEINS[0], PROTEINS[1], 1)])
    section = leakage_section(test, {"train": test}, {"valid": "it is gone"}, "Nothing.")
    assert section.numbers["train"]["num_repeated_pairs"] == 1
    assert section.numbers["not_compared"] == {"valid": "it is gone"}
    text = " ".join([*section.notes, *(cell for row in section.rows for cell in row)])
    assert "Not compared with valid: it is gone." in text
    assert "pretraining, by its model card: Nothing." in text
    assert "100.0%" in text
