"""The ontology against naive walks over random graphs, hand-worked examples, and files that are wrong."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.finetune.function.ontology import NAMESPACES, read_ontology
from tests.finetune.function.ontologies import (
    Terms,
    matrix,
    naive_ancestors,
    naive_content,
    named,
    ontology_of,
    propagated,
    random_annotations,
    random_terms,
)

SEEDS = st.integers(0, 10_000)
# A root, two children, and a term that is part of one and a kind of the other.
DIAMOND: Terms = {
    "GO:0000001": (2, {}),
    "GO:0000012": (2, {"GO:0000001": "is_a"}),
    "GO:0000011": (2, {"GO:0000001": "is_a"}),
    "GO:0000003": (2, {"GO:0000011": "part_of", "GO:0000012": "is_a"}),
}
OBSOLETE = """
[Term]
id: GO:0000090
name: obsolete with a replacement
namespace: molecular_function
is_obsolete: true
replaced_by: GO:0000011

[Term]
id: GO:0000091
name: obsolete without one
namespace: molecular_function
is_obsolete: true
consider: GO:0000011
"""


@given(SEEDS)
def test_ancestors_and_propagation_are_those_of_a_naive_walk(tmp_path: Path, seed: int) -> None:
    terms = random_terms(seed, 25)
    ontology = ontology_of(tmp_path, terms)
    ancestors = named(ontology, ontology.ancestors)
    assert ancestors == [naive_ancestors(terms, term) for term in ontology.terms]
    annotations = random_annotations(seed, terms, 8)
    assert named(ontology, ontology.propagate(matrix(ontology, annotations))) == propagated(terms, annotations)
    below = [sum(term in of_other for of_other in ancestors) - 1 for term in ontology.terms]
    assert ontology.num_descendants.tolist() == below


@given(SEEDS)
def test_parents_come_before_their_children_and_roots_stay_apart(tmp_path: Path, seed: int) -> None:
    ontology = ontology_of(tmp_path, random_terms(seed, 25))
    children = np.repeat(np.arange(len(ontology)), np.diff(ontology.parent_starts))
    assert (ontology.parents < children).all()
    assert (ontology.namespaces[ontology.parents] == ontology.namespaces[children]).all()
    assert sorted(ontology.terms[root] for root in np.flatnonzero(ontology.is_root)) == [
        "GO:0000000", "GO:0000001", "GO:0000002"]  # fmt: skip


@given(SEEDS)
def test_most_specific_terms_have_no_descendant_beside_them(tmp_path: Path, seed: int) -> None:
    terms = random_terms(seed, 25)
    ontology = ontology_of(tmp_path, terms)
    annotations = random_annotations(seed, terms, 8)  # not propagated: a grandchild may be there without the child
    expected = [
        {term for term in own if not any(term in naive_ancestors(terms, other) - {other} for other in own)}
        for own in annotations
    ]
    assert named(ontology, ontology.most_specific(matrix(ontology, annotations))) == expected


@given(SEEDS)
def test_information_content_is_that_of_naive_counts(tmp_path: Path, seed: int) -> None:
    terms = random_terms(seed, 25)
    ontology = ontology_of(tmp_path, terms)
    annotations = random_annotations(seed, terms, 12)
    expected = naive_content(terms, propagated(terms, annotations))
    content = ontology.information_content(matrix(ontology, annotations))
    assert content == pytest.approx([expected[term] for term in ontology.terms], abs=1e-12)
    assert (content >= 0).all()


def test_information_content_by_hand(tmp_path: Path) -> None:
    ontology = ontology_of(tmp_path, DIAMOND)
    annotations = [{"GO:0000011"}, {"GO:0000003"}, {"GO:0000011", "GO:0000012"}, {"GO:0000001"}]
    content = ontology.information_content(matrix(ontology, annotations))
    # Of four proteins three have 11 and two have 12; of the two with both one has 3.
    by_term = {term: content[number] for term, number in ontology.numbers.items()}
    expected = {"GO:0000001": 0, "GO:0000011": np.log2(4 / 3), "GO:0000012": 1, "GO:0000003": 1}
    assert by_term == pytest.approx(expected)


@given(SEEDS, st.booleans())
def test_consistent_scores_are_the_largest_among_the_descendants(tmp_path: Path, seed: int, is_cut: bool) -> None:
    terms = random_terms(seed, 25)
    ontology = ontology_of(tmp_path, terms)
    random = np.random.default_rng(seed)
    chosen = np.flatnonzero(random.random(len(ontology)) < (0.5 if is_cut else 1.1))
    scores = random.random((3, len(chosen))).astype(np.float32)
    given_scores = scores.copy()
    found = ontology.make_consistent(scores, chosen if is_cut else None)
    for column, term in enumerate(chosen):
        name = ontology.terms[term]
        below = [place for place, other in enumerate(chosen) if name in naive_ancestors(terms, ontology.terms[other])]
        assert (found[:, column] == scores[:, below].max(axis=1)).all()
    assert (scores == given_scores).all()


def test_siblings_are_the_other_children_of_all_parents(tmp_path: Path) -> None:
    ontology = ontology_of(tmp_path, DIAMOND | {"GO:0000004": (2, {"GO:0000012": "is_a"})})
    siblings = {term: [ontology.terms[other] for other in ontology.siblings(number)]
                for term, number in ontology.numbers.items()}  # fmt: skip
    assert siblings == {"GO:0000001": [], "GO:0000011": ["GO:0000012"], "GO:0000012": ["GO:0000011"],
                        "GO:0000003": ["GO:0000004"], "GO:0000004": ["GO:0000003"]}  # fmt: skip


def test_what_a_file_says_of_a_term_is_kept(tmp_path: Path) -> None:
    crossing = DIAMOND | {"GO:0000002": (0, {}), "GO:0000005": (0, {"GO:0000002": "is_a", "GO:0000003": "part_of"})}
    ontology = ontology_of(tmp_path, crossing, OBSOLETE)
    assert ontology.terms == ("GO:0000001", "GO:0000002", "GO:0000005", "GO:0000011", "GO:0000012", "GO:0000003")
    assert ontology.names[0] == "name of GO:0000001"
    assert ontology.definitions[0] == 'What "GO:0000001" is.'
    assert [NAMESPACES[place] for place in ontology.namespaces[:2]] == ["molecular_function", "biological_process"]
    assert ontology.relations[ontology.parent_starts[5] :].tolist() == [1, 0]  # part of 11, a kind of 12
    assert ontology.num_crossing == 1  # a process that is part of a function
    assert ontology.version == "releases/2022-07-01"
    (tmp_path / "packed.obo.gz").write_bytes(gzip.compress((tmp_path / "go-basic.obo").read_bytes()))
    assert read_ontology(tmp_path / "packed.obo.gz").terms == ontology.terms


def test_other_identifiers_are_put_right_or_counted(tmp_path: Path) -> None:
    alternative = "\n[Term]\nid: GO:0000007\nname: seven\nnamespace: molecular_function\nalt_id: GO:0000077\n"
    ontology = ontology_of(tmp_path, DIAMOND, OBSOLETE + alternative)
    asked = ["GO:0000001", "GO:0000077", "GO:0000090", "GO:0000091", "GO:0000091", "GO:9999999", "nonsense"]
    resolved = ontology.resolve(asked)
    assert [ontology.terms[number] if number >= 0 else "" for number in resolved.numbers] == [
        "GO:0000001", "GO:0000007", "GO:0000011", "", "", "", ""]  # fmt: skip
    assert resolved.replaced == {"GO:0000077": "GO:0000007", "GO:0000090": "GO:0000011"}
    assert resolved.obsolete == {"GO:0000091": 2}
    assert resolved.unknown == {"GO:9999999": 1, "nonsense": 1}


def test_a_cycle_is_named(tmp_path: Path) -> None:
    cycle = DIAMOND | {"GO:0000012": (2, {"GO:0000001": "is_a", "GO:0000003": "part_of"})}
    with pytest.raises(InputError, match=r"cycle, GO:0000003 -> GO:0000012 -> GO:0000003: correct"):
        ontology_of(tmp_path, cycle)


RECORD = "[Term]\nid: GO:0000001\nname: one\nnamespace: molecular_function\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no terms"),
        (">P1\nMKV\n", "not an ontology in OBO format"),
        ("EntryID\tterm\taspect\n", "not an ontology in OBO format"),
        (RECORD.replace("molecular_function", "chemistry"), "namespace 'chemistry'"),
        (RECORD + "is_a: GO:0000002\n", "GO:0000001 refers to GO:0000002, which has no record"),
        (RECORD.replace("id: ", "\x00"), "not an ontology in OBO format"),
        (b"\xff\xfe\x00[Term]", "not an ontology in OBO format"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "go-basic.obo"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as raised:
        read_ontology(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_ontology(tmp_path / "go-basic.obo")
