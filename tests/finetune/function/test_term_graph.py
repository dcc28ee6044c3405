"""Refinement over the ontology against loops over parents and ancestors."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from megaprot.finetune.function.ontology import Ontology, read_ontology
from megaprot.finetune.function.term_graph import TermBlock, TermGraph, term_block
from tests.finetune.function.towers_data import small_ontology


@pytest.fixture(scope="module")
def ontology(tmp_path_factory: pytest.TempPathFactory) -> Ontology:
    path = tmp_path_factory.mktemp("ontology") / "go-basic.obo"
    path.write_text(small_ontology()[0])
    return read_ontology(path)


def above(ontology: Ontology, term: int, graph: str) -> set[int]:
    parents = set(ontology.parents[ontology.parent_starts[term] : ontology.parent_starts[term + 1]].tolist())
    if graph == "layer":
        return parents
    return parents | {further for parent in parents for further in above(ontology, parent, graph)}


@pytest.mark.parametrize("graph", ["ancestors", "layer"])
def test_a_block_reads_the_terms_asked_for_and_what_refines_them(ontology: Ontology, graph: str) -> None:
    terms = np.array([17, 4, 29, 0])
    block = term_block(ontology, terms, graph)
    assert block.asked.tolist() == terms.tolist()
    assert len(set(block.terms.tolist())) == len(block.terms)
    found: dict[int, set[int]] = {term: set() for term in terms.tolist()}
    for target, source in block.edges.t().tolist():
        found[int(block.terms[target])].add(int(block.terms[source]))
    assert found == {term: above(ontology, term, graph) for term in terms.tolist()}
    assert set(block.terms.tolist()) == set(terms.tolist()).union(*found.values())


def test_a_layer_adds_what_the_mean_of_the_parents_says(ontology: Ontology) -> None:
    torch.manual_seed(1)
    layer, block = TermGraph("layer", 6), term_block(ontology, np.array([17, 0]), "layer")
    vectors = torch.randn(len(block.terms), 6)
    by_term = dict(zip(block.terms.tolist(), vectors, strict=True))
    mean = torch.stack([by_term[parent] for parent in above(ontology, 17, "layer")]).mean(dim=0)
    expected = by_term[17] + layer.last(functional.gelu(layer.first(layer.norm(mean))))
    refined = layer(vectors, block)
    torch.testing.assert_close(refined[0], expected)
    torch.testing.assert_close(refined[1], by_term[0])  # a root has no parents


def test_smoothing_mixes_a_term_with_the_mean_of_its_ancestors(ontology: Ontology) -> None:
    graph, block = TermGraph("ancestors", 6), term_block(ontology, np.array([29]), "ancestors")
    vectors = torch.randn(len(block.terms), 6)
    torch.testing.assert_close(graph(vectors, block)[0], (vectors[0] + vectors[1:].mean(dim=0)) / 2)


@pytest.mark.parametrize("graph", ["none", "ancestors", "layer"])
def test_free_texts_have_no_place_in_the_graph(graph: str) -> None:
    vectors = torch.randn(3, 6)
    block = TermBlock(np.full(3, -1), 3, torch.zeros(2, 0, dtype=torch.long))
    torch.testing.assert_close(TermGraph(graph, 6)(vectors, block), vectors)
