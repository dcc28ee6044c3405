"""Random ontologies and annotations as plain Python, beside the naive way to each figure."""

import math
import random
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.ontology import NAMESPACES, Ontology, read_ontology

Terms = dict[str, tuple[int, dict[str, str]]]
"""{term: (place of its namespace, {parent: relation})}."""


def obo_text(terms: Terms, more: str = "") -> str:
    """An OBO file of these terms, in an order drawn by their number, so that parents may come after children."""
    parts = ["format-version: 1.2\ndata-version: releases/2022-07-01\n"]
    names = sorted(terms)
    random.Random(len(terms)).shuffle(names)
    for term in names:
        namespace, parents = terms[term]
        lines = [f"id: {term}", f"name: name of {term}", f"namespace: {NAMESPACES[namespace]}",
                 f'def: "What \\"{term}\\" is." [GOC:x]']  # fmt: skip
        lines += [f"is_a: {p} ! comment" if r == "is_a" else f"relationship: {r} {p}" for p, r in parents.items()]
        parts.append("\n[Term]\n" + "\n".join(lines) + "\n")
    return "".join(parts) + more


def ontology_of(folder: Path, terms: Terms, more: str = "") -> Ontology:
    path = folder / "go-basic.obo"
    path.write_text(obo_text(terms, more))
    return read_ontology(path)


def random_terms(seed: int, num_terms: int) -> Terms:
    """Three roots, and terms with one to three parents in their namespace; some relations that do not count."""
    draw = random.Random(seed)
    terms: Terms = {f"GO:{place:07d}": (place, {}) for place in range(3)}
    for number in range(3, num_terms):
        namespace = draw.randrange(3)
        own = [term for term, (of, _) in terms.items() if of == namespace]
        chosen = draw.sample(own, min(len(own), draw.randint(1, 3)))
        parents = {parent: draw.choice(("is_a", "part_of")) for parent in chosen}
        stranger = draw.choice(sorted(terms))
        if stranger not in parents:
            parents[stranger] = "regulates"
        name = draw.randrange(1000)  # so that the order of identifiers is not that of the levels
        terms[f"GO:{name:03d}{number:04d}"] = (namespace, parents)
    return terms


def naive_ancestors(terms: Terms, term: str) -> set[str]:
    """A term with all terms above it."""
    found = {term}
    for parent, relation in terms[term][1].items():
        if relation in ("is_a", "part_of") and terms[parent][0] == terms[term][0]:
            found |= naive_ancestors(terms, parent)
    return found


def random_annotations(seed: int, terms: Terms, num_proteins: int) -> list[set[str]]:
    draw = random.Random(seed + 1)
    return [set(draw.sample(sorted(terms), draw.randint(0, 4))) for _ in range(num_proteins)]


def matrix(ontology: Ontology, annotations: list[set[str]]) -> csr_array:
    dense = np.zeros((len(annotations), len(ontology)), dtype=bool)
    for protein, of_protein in enumerate(annotations):
        dense[protein, [ontology.numbers[term] for term in of_protein]] = True
    return csr_array(dense)


def propagated(terms: Terms, annotations: list[set[str]]) -> list[set[str]]:
    return [set().union(*(naive_ancestors(terms, term) for term in of_protein)) for of_protein in annotations]


def named(ontology: Ontology, labels: csr_array) -> list[set[str]]:
    return [{ontology.terms[term] for term in np.flatnonzero(row)} for row in labels.toarray()]


def naive_content(terms: Terms, labels: list[set[str]]) -> dict[str, float]:
    """Information accretion of each term, in bits."""
    found = {}
    for term, (namespace, parents) in terms.items():
        counted = {p for p, relation in parents.items() if relation != "regulates" and terms[p][0] == namespace}
        with_term = sum(term in of_protein for of_protein in labels)
        with_parents = sum(counted <= of_protein for of_protein in labels)
        if not counted:
            found[term] = 0.0
        elif with_term:
            found[term] = -math.log2(with_term / with_parents)
        else:
            found[term] = -math.log2(1 / (with_parents + 1))
    return found


def function_data(ontology: Ontology, annotations: list[set[str]], sequences: list[bytes]) -> FunctionData:
    """The data of these proteins, as if it were read."""
    annotated = matrix(ontology, annotations)
    names = tuple(f"P{number}" for number in range(len(annotations)))
    return FunctionData(ontology, names, tuple(sequences), annotated, ontology.propagate(annotated), {})
