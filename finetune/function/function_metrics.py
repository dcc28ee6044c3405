"""The evaluation of function prediction: scores of proteins x terms, the four-way grid, and term- and protein-centric
figures by namespace.

    scored = FunctionScores.empty(data, proteins, terms)   float32 [n, m], filled by blocks of proteins
    scored.fill(first_row, scores)
    best_thresholds(scored) -> {namespace: threshold}      of the largest pooled F1; to be learned in validation
    cell_metrics(scored, rows, columns, thresholds) -> {namespace: {metric: value}}
    four_way_grid(seen_proteins, unseen_proteins, split, thresholds) -> {cell: {namespace: {metric: value}}}
    protein_centric(scored, content) -> ProteinCentric     Fmax and Smin
    term_centric(scored, rows, columns) -> TermCentric     AUROC and AUPR of each term; both by proteins' weights
    evaluate(data, split, scorer) -> {...}                 all of it for a model or a baseline, on a split
    definitions() -> {metric: what it is}

A pair counts where its protein has any annotation in the term's namespace, as in CAFA: of the others nobody knows.
Roots never count. Namespaces are CAFA's BPO, CCO and MFO, and ``all`` for the three together. All figures are exact,
over all pairs, never averaged over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from megaprot.common.errors import InputError
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.ontology import ASPECTS, Ontology
from megaprot.finetune.function.protein_centric import ProteinCentric
from megaprot.finetune.function.ranking import Scores, auroc_and_aupr, best_f1
from megaprot.finetune.function.splits import TEST, TRAIN, VALID, FunctionSplit
from megaprot.finetune.function.term_centric import TermCentric

ALL = "all"
LEAST_POSITIVES = 10
_MACRO = ("auroc", "aupr", "f1", "precision", "recall")
_ROWS = 512  # proteins in dense form at a time
CELLS = (
    "seen_protein_seen_term",
    "seen_protein_unseen_term",
    "unseen_protein_seen_term",
    "unseen_protein_unseen_term",
)
CellMetrics = dict[str, dict[str, float]]
"""{namespace: {metric: value}}."""
Scorer = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""What gives the scores of some proteins x some terms, both by number, float32 [n, m] from 0 to 1."""


@dataclass(frozen=True, eq=False)
class FunctionScores:
    """Scores of proteins x terms beside what is true.

    Attributes:
        ontology: The ontology.
        terms: Numbers of the terms of the columns, ascending, int64 [m].
        labels: Propagated labels, bool [n, m].
        in_namespace: Whether each protein has an annotation in each namespace, bool [n, 3].
        scores: Higher is likelier, float32 [n, m]; nan until filled. For Fmax and Smin from 0 to 1.
    """

    ontology: Ontology
    terms: NDArray[np.int64]
    labels: csr_array
    in_namespace: NDArray[np.bool_]
    scores: NDArray[np.float32]

    @staticmethod
    def empty(data: FunctionData, proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> FunctionScores:
        """Return room for the scores of some proteins and terms of the data, 5 bytes a pair at most."""
        of_proteins = csr_array(data.labels[proteins])
        return FunctionScores(
            data.ontology,
            terms,
            csr_array(of_proteins[:, terms]),
            data.ontology.annotated_namespaces(of_proteins),
            np.full((len(proteins), len(terms)), np.nan, dtype=np.float32),
        )

    def with_scores(self, scores: NDArray[np.float32]) -> FunctionScores:
        """Return the same proteins and terms with other scores [n, m], or [m] for all proteins alike."""
        full = np.broadcast_to(scores.astype(np.float32), self.scores.shape)
        return FunctionScores(self.ontology, self.terms, self.labels, self.in_namespace, full)

    def fill(self, first_row: int, scores: NDArray[np.float32]) -> None:
        """Put in the scores of a block of proteins [b, m]."""
        self.scores[first_row : first_row + len(scores)] = scores

    def pairs(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return labels and which pairs count, both bool [rows, columns], dense."""
        terms = self.terms[columns]
        counts = self.in_namespace[rows][:, self.ontology.namespaces[terms]] & ~self.ontology.is_root[terms]
        return self.labels[rows][:, columns].toarray(), counts

    def frequent(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], least_positives: int = LEAST_POSITIVES
    ) -> NDArray[np.int64]:
        """Return those of some columns, roots left out, that have enough positives among some proteins."""
        num_positives = np.bincount(self.labels[rows].indices, minlength=len(self.terms))[columns]
        return columns[(num_positives >= max(least_positives, 1)) & ~self.ontology.is_root[self.terms[columns]]]

    def columns_of(self, namespace: str) -> NDArray[np.int64]:
        """Return the columns of a namespace, roots left out; of ``all`` those of the three."""
        is_of = ~self.ontology.is_root[self.terms]
        if namespace != ALL:
            is_of &= self.ontology.namespaces[self.terms] == ASPECTS.index(namespace)
        return np.flatnonzero(is_of).astype(np.int64)


def best_thresholds(scored: FunctionScores) -> dict[str, float]:
    """Return {namespace: the threshold of its largest pooled F1}, for BPO, CCO and MFO; infinite without positives."""
    rows = np.arange(len(scored.scores))
    return {aspect: best_f1(*_split(scored, rows, scored.columns_of(aspect)))[1] for aspect in ASPECTS}


def cell_metrics(
    scored: FunctionScores,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    thresholds: Mapping[str, float],
    least_positives: int = LEAST_POSITIVES,
) -> CellMetrics:
    """Return the metrics of some proteins x some terms, by namespace and over all.

    Args:
        scored: Scores, all filled in for these rows and columns.
        rows: Places of the proteins.
        columns: Places of the terms.
        thresholds: {BPO, CCO and MFO: from which score on a term counts as predicted}.
        least_positives: Positives among the rows that a term needs for macro averages; it needs a negative too.

    Raises:
        InputError: Scores are missing.
    """
    if any(np.isnan(scored.scores[np.ix_(*some)]).any() for some in ((rows[:1], columns), (rows, columns[:1]))):
        raise InputError("scores of some proteins are missing or nan: score them all, by a model of finite weights.")
    by_term = _by_term(scored, rows, columns, thresholds, least_positives)
    is_of = {aspect: np.isin(columns, scored.columns_of(aspect)) for aspect in ASPECTS}
    pairs = {aspect: _split(scored, rows, columns[is_of[aspect]]) for aspect in ASPECTS}
    is_of[ALL] = np.logical_or.reduce(list(is_of.values()))
    positives, negatives = (np.concatenate(of_all) for of_all in zip(*pairs.values(), strict=True))
    pairs[ALL] = positives, negatives
    return {
        namespace: _figures(*pairs[namespace], {name: values[is_of[namespace]] for name, values in by_term.items()})
        for namespace in (*ASPECTS, ALL)
    }


def _figures(positives: Scores, negatives: Scores, by_term: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Return the metrics of the pairs that count and of the terms they are of."""
    auroc, aupr = auroc_and_aupr(positives, negatives)
    hits, predicted, true = (float(by_term[name].sum()) for name in ("hits", "predicted", "true"))
    is_scored = np.isfinite(by_term["auroc"])
    return {
        "num_pairs": float(len(positives) + len(negatives)),
        "num_positives": float(len(positives)),
        "num_terms_in_macro": float(is_scored.sum()),
        "pooled_auroc": auroc,
        "pooled_aupr": aupr,
        "pooled_f1": 2 * hits / (predicted + true) if predicted + true else 0.0,
        "pooled_precision": hits / predicted if predicted else 0.0,
        "pooled_recall": hits / true if true else 0.0,
        **{f"macro_{name}": _mean(by_term[name][is_scored]) for name in _MACRO},
    }


def four_way_grid(
    seen_proteins: FunctionScores,
    unseen_proteins: FunctionScores,
    split: FunctionSplit,
    thresholds: Mapping[str, float],
    least_positives: int = LEAST_POSITIVES,
) -> dict[str, CellMetrics]:
    """Return {cell: metrics} of seen and unseen proteins x seen and unseen terms.

    Args:
        seen_proteins: Scores of training proteins, all or a sample, for ``split.terms_of(TEST)`` (or VALID).
        unseen_proteins: Scores of the test's (or validation's) proteins for the same terms.
        split: Tells seen terms from unseen ones.
        thresholds: As in :func:`cell_metrics`.
        least_positives: As in :func:`cell_metrics`.
    """
    found = {}
    for cell in CELLS:
        scored = unseen_proteins if cell.startswith("unseen") else seen_proteins
        is_wanted = split.is_seen[scored.terms] == cell.endswith("_seen_term")
        rows, columns = np.arange(len(scored.scores)), np.flatnonzero(is_wanted)
        found[cell] = cell_metrics(scored, rows, columns, thresholds, least_positives)
    return found


def term_centric(scored: FunctionScores, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> TermCentric:
    """Return the rankings of some proteins by each of some terms, as functions of the proteins' weights [rows].

    Macro averages are over ``FunctionScores.frequent`` columns.
    """
    labels, counts = scored.pairs(rows, columns)
    return TermCentric(scored.scores[np.ix_(rows, columns)], labels, counts)


def protein_centric(scored: FunctionScores, content: NDArray[np.float64]) -> ProteinCentric:
    """Return Fmax and Smin of scores, which are from 0 to 1 and consistent with the ontology.

    Args:
        scored: The scores.
        content: ``training_content`` of the data.
    """
    found = ProteinCentric(scored.ontology, scored.terms, content)
    for first in range(0, len(scored.scores), _ROWS):
        found.add(scored.scores[first : first + _ROWS], scored.labels[first : first + _ROWS].toarray())
    return found


def training_content(data: FunctionData, split: FunctionSplit) -> NDArray[np.float64]:
    """Return the information content of all terms from the training proteins, float64 [num_terms].

    Unseen terms count with their true labels: content is a weight of the evaluation that no model is shown, and without
    them a frequent unseen term would weigh as much as the rarest.
    """
    return data.ontology.information_content(csr_array(data.labels[split.numbers_of(TRAIN)]))


def evaluate(data: FunctionData, split: FunctionSplit, scorer: Scorer, of: int = TEST) -> dict[str, Any]:
    """Return the whole evaluation of a model or a baseline: ``thresholds``, ``grid`` and ``protein_centric``.

    Scores are made consistent with the ontology first. Thresholds are learned on validation proteins and seen terms.
    Seen proteins are a sample of the training ones, as many as the split has (``FunctionSplit.sample_of_seen``). Fmax
    and Smin are over the split's proteins and all its terms, seen and unseen.

    Args:
        data: Proteins and labels.
        split: The split.
        scorer: Gives the scores.
        of: VALID or TEST.
    """

    def scored(proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> FunctionScores:
        scores = data.ontology.make_consistent(scorer(proteins, terms), terms)
        return FunctionScores.empty(data, proteins, terms).with_scores(scores)

    thresholds = best_thresholds(scored(split.numbers_of(VALID), np.flatnonzero(split.is_seen)))
    proteins, terms = split.numbers_of(of), split.terms_of(of)
    unseen = scored(proteins, terms)
    grid = four_way_grid(scored(split.sample_of_seen(len(proteins)), terms), unseen, split, thresholds)
    centric = protein_centric(unseen, training_content(data, split))
    by_namespace = {aspect: asdict(centric.at_best(place)) for place, aspect in enumerate(ASPECTS)}
    return {"thresholds": thresholds, "grid": grid, "protein_centric": by_namespace}


def definitions() -> dict[str, str]:
    """Return {metric: what it is, in one sentence}."""
    pairs = "over all pairs of a protein and a term of a namespace in which the protein is annotated"
    terms = f"mean over terms with at least {LEAST_POSITIVES} positives"
    cut = "at the threshold of the largest pooled F1 on validation proteins and seen terms, one a namespace"
    return {
        "pooled_auroc": f"area under the ROC curve {pairs}",
        "pooled_aupr": f"average precision {pairs}",
        **{f"pooled_{name}": f"{name} {pairs}, {cut}" for name in ("f1", "precision", "recall")},
        "macro_auroc": f"area under the ROC curve of each term over proteins, {terms} (blind to the protein: 0.5)",
        "macro_aupr": f"average precision of each term over proteins, {terms}",
        **{f"macro_{name}": f"{name} of each term, {terms}, {cut}" for name in ("f1", "precision", "recall")},
        "fmax": "CAFA's protein-centric Fmax at thresholds 0.01, 0.02, ... 1.00, roots left out",
        "smin": "CAFA's Smin in bits, information content from training annotations, roots left out",
    }


def _split(scored: FunctionScores, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[Scores, Scores]:
    """Return the scores of positive and of negative pairs that count."""
    positives, negatives = [np.empty(0, dtype=np.float32)], [np.empty(0, dtype=np.float32)]
    for first in range(0, len(rows), _ROWS):
        some = rows[first : first + _ROWS]
        labels, counts = scored.pairs(some, columns)
        scores = scored.scores[np.ix_(some, columns)]
        positives.append(scores[labels & counts])
        negatives.append(scores[~labels & counts])
    return np.concatenate(positives), np.concatenate(negatives)


def _by_term(
    scored: FunctionScores,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    thresholds: Mapping[str, float],
    least_positives: int,
) -> dict[str, NDArray[np.float64]]:
    """Return figures of each term over proteins, each float64 [columns]; AUROC and AUPR nan where not scored."""
    cuts = np.array([thresholds[aspect] for aspect in ASPECTS])[scored.ontology.namespaces[scored.terms[columns]]]
    sums = np.zeros((3, len(columns)))  # hits, predicted, true
    for first in range(0, len(rows), _ROWS):
        some = rows[first : first + _ROWS]
        labels, counts = scored.pairs(some, columns)
        is_predicted = (scored.scores[np.ix_(some, columns)] >= cuts) & counts
        labels &= counts
        sums += [each.sum(axis=0) for each in (labels & is_predicted, is_predicted, labels)]
    hits, predicted, true = sums
    frequent = scored.frequent(rows, columns, least_positives)
    areas = np.full((2, len(columns)), np.nan)
    areas[:, np.isin(columns, frequent)] = term_centric(scored, rows, frequent).areas(np.ones(len(rows)))
    precision, recall = _ratio(hits, predicted), _ratio(hits, true)
    return {
        "hits": hits,
        "predicted": predicted,
        "true": true,
        "auroc": areas[0],
        "aupr": areas[1],
        "f1": _ratio(2 * hits, predicted + true),
        "precision": precision,
        "recall": recall,
    }


def _ratio(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(parts, wholes, out=np.zeros_like(parts), where=wholes > 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
