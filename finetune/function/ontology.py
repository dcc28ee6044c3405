"""The Gene Ontology as arrays: terms so numbered that every parent comes before its children.

    read_ontology(path) -> Ontology
    ontology.resolve(identifiers) -> Resolved        numbers of terms; alternative and replaced ids put right, counted
    ontology.propagate(annotations) -> csr_array      bool [n, num_terms] with all ancestors
    ontology.ancestors -> csr_array                   bool [num_terms, num_terms], a term being its own ancestor
    ontology.make_consistent(scores, terms)           a parent at least as likely as its children
    ontology.information_content(labels) -> [num_terms] bits
    ontology.siblings(term), ontology.most_specific(labels), ontology.num_descendants

Relations are ``is_a`` and ``part_of`` (the true path rule, Ashburner et al., Nature Genetics 2000), within a namespace
only: the three roots are kept apart, as CAFA does, so that an annotation of a molecular function never becomes one of a
biological process. Other relations (``regulates``) are left out.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
import obonet
from numpy.typing import NDArray
from scipy.sparse import csr_array, eye_array

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.source import Source

NAMESPACES = ("biological_process", "cellular_component", "molecular_function")
ASPECTS = ("BPO", "CCO", "MFO")
"""What CAFA calls the namespaces, in the same order."""
RELATIONS = ("is_a", "part_of")


@dataclass(frozen=True)
class Resolved:
    """Numbers of terms that identifiers stand for, and what became of the others.

    Attributes:
        numbers: int64 [num_identifiers], -1 for what stands for no term.
        replaced: {identifier: the term it stands for}, of alternative ids and obsolete terms with a replacement.
        obsolete: How often each obsolete term without a replacement occurs.
        unknown: How often each identifier occurs that the ontology does not have.
    """

    numbers: NDArray[np.int64]
    replaced: dict[str, str]
    obsolete: Counter[str]
    unknown: Counter[str]


@dataclass(frozen=True, eq=False)
class Ontology:
    """Terms in topological order, numbered from 0: a parent's number is below its children's.

    Attributes:
        path: The file they were read from.
        terms: Identifiers such as ``GO:0008150``, without obsolete ones.
        names: Their names.
        definitions: Their definitions, without quotes and sources; empty where there is none.
        namespaces: Place in ``NAMESPACES`` of each, int8 [num_terms].
        parent_starts: Where the parents of each term begin in ``parents``, int64 [num_terms + 1].
        parents: Their numbers, int32 [num_edges].
        relations: Place in ``RELATIONS`` of each edge, int8 [num_edges].
        replacements: {alternative id, or obsolete term that is replaced: the term that stands for it}.
        obsolete: Identifiers of obsolete terms.
        num_crossing: Edges between namespaces, which are left out.
        version: The file's ``data-version``, or empty.
    """

    path: str
    terms: tuple[str, ...]
    names: tuple[str, ...]
    definitions: tuple[str, ...]
    namespaces: NDArray[np.int8]
    parent_starts: NDArray[np.int64]
    parents: NDArray[np.int32]
    relations: NDArray[np.int8]
    replacements: dict[str, str]
    obsolete: frozenset[str]
    num_crossing: int
    version: str

    def __len__(self) -> int:
        return len(self.terms)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Return {identifier: number}, of terms alone."""
        return {term: number for number, term in enumerate(self.terms)}

    @cached_property
    def is_root(self) -> NDArray[np.bool_]:
        """Return which terms have no parents, [num_terms]."""
        return np.diff(self.parent_starts) == 0

    @cached_property
    def edges(self) -> csr_array:
        """Return which terms are parents of which, bool [num_terms (children), num_terms (parents)]."""
        ones = np.ones(len(self.parents), dtype=bool)
        return csr_array((ones, self.parents, self.parent_starts), shape=(len(self), len(self)))

    @cached_property
    def ancestors(self) -> csr_array:
        """Return the ancestors of each term, itself included, bool [num_terms, num_terms]."""
        reached = csr_array(eye_array(len(self), dtype=bool, format="csr") + self.edges)
        while True:  # paths twice as long each time
            further = csr_array(reached @ reached)
            if further.nnz == reached.nnz:
                reached.sort_indices()
                return reached
            reached = further

    @cached_property
    def descendants(self) -> csr_array:
        """Return the descendants of each term, itself included, bool [num_terms, num_terms]."""
        return csr_array(self.ancestors.T)

    @cached_property
    def num_descendants(self) -> NDArray[np.int64]:
        """Return how many terms each has below it, itself not counted, [num_terms]."""
        return np.bincount(self.ancestors.indices, minlength=len(self)) - 1

    def resolve(self, identifiers: Iterable[str]) -> Resolved:
        """Return the terms that identifiers stand for, alternative ids and replaced terms put right."""
        numbers: list[int] = []
        replaced: dict[str, str] = {}
        obsolete: Counter[str] = Counter()
        unknown: Counter[str] = Counter()
        for identifier in identifiers:
            number = self.numbers.get(identifier, -1)
            if number < 0 and identifier in self.replacements:
                replaced[identifier] = self.replacements[identifier]
                number = self.numbers[replaced[identifier]]
            elif number < 0:
                (obsolete if identifier in self.obsolete else unknown)[identifier] += 1
            numbers.append(number)
        return Resolved(np.array(numbers, dtype=np.int64), replaced, obsolete, unknown)

    def propagate(self, annotations: csr_array) -> csr_array:
        """Return annotations bool [n, num_terms] with all ancestors of every annotated term."""
        labels = csr_array(annotations.astype(bool) @ self.ancestors)
        labels.sort_indices()
        return labels

    def most_specific(self, labels: csr_array) -> csr_array:
        """Return the terms of ``labels`` bool [n, num_terms] of which no descendant is in the same row."""
        labels = csr_array(labels.astype(bool)).astype(np.int32)
        num_below = csr_array(labels @ self.ancestors.astype(np.int32)).multiply(labels)  # a term itself counts once
        found = csr_array(num_below == 1)
        found.sort_indices()
        return found

    def annotated_namespaces(self, labels: csr_array) -> NDArray[np.bool_]:
        """Return whether each row of ``labels`` has a term of each namespace, roots alone not counting, bool [n, 3]."""
        found = np.zeros((labels.shape[0], len(NAMESPACES)), dtype=bool)
        rows, columns = labels.tocoo().coords
        is_counted = ~self.is_root[columns]
        found[rows[is_counted], self.namespaces[columns[is_counted]]] = True
        return found

    def siblings(self, term: int) -> NDArray[np.int64]:
        """Return the other children of a term's parents, ascending."""
        parents = self.parents[self.parent_starts[term] : self.parent_starts[term + 1]]
        below = np.unique(self.children[parents].indices).astype(np.int64)
        return below[below != term]

    @cached_property
    def children(self) -> csr_array:
        """Return which terms are children of which, bool [num_terms (parents), num_terms (children)]."""
        return csr_array(self.edges.T)

    def make_consistent(
        self, scores: NDArray[np.float32], terms: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Return scores float32 [n, num_scored] of which every term's is at least those of its descendants.

        A term takes the largest score among itself and its descendants. Of the ways to consistency (the smallest among
        the ancestors, means of both, isotonic regression) this is the one that leaves the most specific predictions as
        they are, which is what a protein's function is asked for; CAFA's evaluation does the same to submissions.
        Relations hold through terms that are not scored.

        Args:
            scores: Any scores, higher being likelier; not changed.
            terms: Numbers of the terms of the columns; all terms in order where there are none.
        """
        columns = np.arange(len(self)) if terms is None else terms
        return _raised(np.ascontiguousarray(scores, np.float32), columns, self.parent_starts, self.parents)

    def information_content(self, labels: csr_array) -> NDArray[np.float64]:
        """Return each term's information accretion in bits, -log2 P(term | all its parents), float64 [num_terms].

        Clark and Radivojac, "Information-theoretic evaluation of predicted ontological annotations" (Bioinformatics
        2013), estimated from labels bool [num_proteins, num_terms], which are propagated here: proteins with the term
        over proteins with all its parents. Roots have 0. Of a term that no protein has, one more is thought to have it.
        """
        annotated = self.propagate(labels)
        num_with_term = np.bincount(annotated.indices, minlength=len(self)).astype(np.float64)
        num_parents = np.diff(self.parent_starts)
        # Proteins that have every parent of a term: how many of them each has, over terms with a parent annotated.
        held = csr_array(annotated.astype(np.int32) @ csr_array(self.children.astype(np.int32)))
        num_with_parents = np.bincount(held.indices[held.data == num_parents[held.indices]], minlength=len(self))
        num_with_parents = np.where(self.is_root, num_with_term, num_with_parents).astype(np.float64)
        is_new = num_with_term == 0
        content = np.log2(num_with_parents + is_new) - np.log2(num_with_term + is_new)
        return np.where(self.is_root, 0.0, content)


@numba.njit(cache=True, nogil=True)
def _raised(
    scores: NDArray[np.float32],
    columns: NDArray[np.int64],
    parent_starts: NDArray[np.int64],
    parents: NDArray[np.int32],
) -> NDArray[np.float32]:
    """Pass each row's scores up to the parents, children first; native because it visits every edge of every row."""
    num_terms = len(parent_starts) - 1
    raised = np.empty_like(scores)
    row = np.empty(num_terms, dtype=np.float32)
    for protein in range(len(scores)):
        row[:] = -np.inf
        for place in range(len(columns)):
            row[columns[place]] = scores[protein, place]
        for term in range(num_terms - 1, -1, -1):
            for edge in range(parent_starts[term], parent_starts[term + 1]):
                if row[parents[edge]] < row[term]:
                    row[parents[edge]] = row[term]
        for place in range(len(columns)):
            raised[protein, place] = row[columns[place]]
    return raised


def read_ontology(path: Path) -> Ontology:
    """Read an ontology in OBO format (``go-basic.obo``), plain or compressed, by way of obonet.

    Raises:
        InputError: The file is missing or no OBO file, a term has no name, another namespace or an unknown parent, or
            relations form a cycle.
    """
    graph = _graph(path)
    namespace_of = {}
    for term, record in graph.nodes(data=True):
        if "name" not in record:
            child = next(iter(graph.predecessors(term)), "")
            raise InputError(f"{path}: {child} refers to {term}, which has no record: give a whole ontology.")
        if "is_obsolete" in record:
            continue
        namespace = record.get("namespace", graph.graph.get("default-namespace", ""))
        if namespace not in NAMESPACES:
            raise InputError(f"{path}: {term} has the namespace '{namespace}', which is not the Gene Ontology's: give "
                             "go-basic.obo.")  # fmt: skip
        namespace_of[term] = NAMESPACES.index(namespace)
    if not namespace_of:
        raise InputError(f"{path} holds no terms: give go-basic.obo.")
    parents, num_crossing = _parents(graph, namespace_of)
    terms = _topological_order(parents, path)
    numbers = {term: number for number, term in enumerate(terms)}
    ordered = [sorted((numbers[parent], relation) for parent, relation in parents[term].items()) for term in terms]
    records = [graph.nodes[term] for term in terms]
    obsolete = frozenset(term for term, record in graph.nodes(data=True) if "is_obsolete" in record)
    return Ontology(
        path=str(path),
        terms=tuple(terms),
        names=tuple(record["name"] for record in records),
        definitions=tuple(_definition(record.get("def", "")) for record in records),
        namespaces=np.array([namespace_of[term] for term in terms], dtype=np.int8),
        parent_starts=np.cumsum([0, *map(len, ordered)]),
        parents=np.array([parent for each in ordered for parent, _ in each], dtype=np.int32),
        relations=np.array([relation for each in ordered for _, relation in each], dtype=np.int8),
        replacements=_replacements(graph, numbers),
        obsolete=obsolete,
        num_crossing=num_crossing,
        version=str(graph.graph.get("data-version", "")),
    )


def _graph(path: Path) -> Any:
    """Return obonet's graph of the file, obsolete terms included."""
    with Source(path).content() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8")
        try:
            return obonet.read_obo(text, ignore_obsolete=False)
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is not an ontology in OBO format ({said}): give go-basic.obo.") from None


def _parents(graph: Any, namespace_of: dict[str, int]) -> tuple[dict[str, dict[str, int]], int]:
    """Return {term: {parent: relation}} within namespaces, and how many edges lead to another one."""
    parents: dict[str, dict[str, int]] = {term: {} for term in namespace_of}
    num_crossing = 0
    for term, parent, relation in graph.edges(keys=True):
        if relation not in RELATIONS or term not in namespace_of or parent not in namespace_of:
            continue  # an obsolete term has no relations that count
        if namespace_of[term] != namespace_of[parent]:
            num_crossing += 1
        else:  # a parent by both relations is one parent
            number = RELATIONS.index(relation)
            parents[term][parent] = min(number, parents[term].get(parent, number))
    return parents, num_crossing


def _topological_order(parents: dict[str, dict[str, int]], path: Path) -> list[str]:
    """Return the terms level by level, by identifier within one; raises InputError for a cycle, which it names."""
    children: dict[str, list[str]] = {term: [] for term in parents}
    num_missing = {term: len(of_term) for term, of_term in parents.items()}
    for term, of_term in parents.items():
        for parent in of_term:
            children[parent].append(term)
    order: list[str] = []
    level = sorted(term for term, count in num_missing.items() if not count)
    while level:
        order += level
        following = []
        for term in level:
            for child in children[term]:
                num_missing[child] -= 1
                if not num_missing[child]:
                    following.append(child)
        level = sorted(following)
    if len(order) < len(parents):
        raise InputError(f"{path}: the relations form a cycle, {' -> '.join(_cycle(parents, set(order)))}: correct one "
                         "of them.")  # fmt: skip
    return order


def _cycle(parents: dict[str, dict[str, int]], outside: set[str]) -> list[str]:
    """Return the terms of a cycle, the first again at the end; each term not ``outside`` has a parent not outside."""
    path = [min(set(parents) - outside)]
    while path[-1] not in path[:-1]:
        path.append(min(set(parents[path[-1]]) - outside))
    return path[path.index(path[-1]) :]


def _replacements(graph: Any, numbers: dict[str, int]) -> dict[str, str]:
    """Return the terms that alternative ids and obsolete terms with one replacement stand for."""
    found: dict[str, str] = {}
    for term, record in graph.nodes(data=True):
        if term in numbers:
            found.update((other, term) for other in record.get("alt_id", ()) if other not in numbers)
    for term, record in graph.nodes(data=True):
        replacing = [other for other in record.get("replaced_by", ()) if other in numbers]
        if term not in numbers and len(replacing) == 1:
            found.setdefault(term, replacing[0])
    return found


def _definition(text: str) -> str:
    """Return ``A "thing".`` of ``"A \\"thing\\"." [source]``."""
    start, end = text.find('"'), text.rfind('"')
    return text[start + 1 : end].replace('\\"', '"').replace("\\n", " ").strip() if end > start else ""
