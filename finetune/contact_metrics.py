"""Precision of predicted contacts: which pairs count, how many are picked, and the variants that others published.

A protein's pairs (i, j), i < j, count where both residues are resolved; of those in a range of separation j - i the
most probable ones are picked, and the precision is the share of true contacts (CA closer than 8 Angstrom) among them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megaprot.finetune.metrics import Weighted, mean_ratio, ratio

CONTACT_DISTANCE = 8.0
"""Angstrom between CA atoms below which residues are in contact (TAPE, CASP)."""
MIN_SEPARATION = 6
"""Pairs closer along the chain carry no label (TAPE)."""
RANGES = {
    "min_sep_6": (6, 0),
    "sep_6_11": (6, 12),
    "sep_12_23": (12, 24),
    "min_sep_12": (12, 0),
    "min_sep_24": (24, 0),
}
"""{name: (least separation, first separation that is too large; 0: none)}."""
SHARES = {"l": 1, "l2": 2, "l5": 5}
"""{name: residues a picked pair}."""
_TAPE, _PROTEINLM = "tape_precision_at_l5", "proteinlm_precision_at_l5"


def contact_labels(coordinates: NDArray[np.floating], is_valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return [L, L] with 1 for contacts, 0 for none, -1 where a residue is not resolved or |i - j| < 6.

    Args:
        coordinates: CA positions [L, 3] in Angstrom.
        is_valid: Which residues are resolved [L].
    """
    squared = ((coordinates[:, None, :] - coordinates[None, :, :]) ** 2).sum(axis=-1)
    labels = (squared < CONTACT_DISTANCE**2).astype(np.int64)
    places = np.arange(len(coordinates))
    is_near = np.abs(places[:, None] - places[None, :]) < MIN_SEPARATION
    labels[is_near | ~(is_valid[:, None] & is_valid[None, :])] = -1
    return labels


def count_hits(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return {name: [true contacts among the picked pairs, picked pairs]} of one protein, for every definition.

    Args:
        probabilities: Of a contact, symmetric [L, L].
        labels: :func:`contact_labels` [L, L].
    """
    length = len(labels)
    first, second = np.triu_indices(length, MIN_SEPARATION)
    chances, truths = probabilities[first, second], labels[first, second]
    order = np.argsort(-chances, kind="stable")
    separations, ranked = (second - first)[order], truths[order]
    is_labelled = ranked >= 0
    counts = {}
    for range_name, (least, end) in RANGES.items():
        inside = is_labelled & (separations >= least) & ((separations < end) if end else True)
        for share_name, share in SHARES.items():
            picked = ranked[inside][: length // share]
            counts[f"precision_at_{share_name}_{range_name}"] = np.array([picked.sum(), len(picked)], dtype=float)
    counts[_TAPE] = _tape_hits(chances, truths, length // 5)
    picked = ranked[is_labelled].repeat(2)[: length // 5]  # both triangles: each pair twice
    counts[_PROTEINLM] = np.array([picked.sum(), len(picked)], dtype=float)
    return counts


def _tape_hits(chances: NDArray[np.floating], truths: NDArray[np.int64], num_picked: int) -> NDArray[np.float64]:
    """Return hits and picks as TAPE counts them: unlabelled pairs have probability 0, and count -1 if picked."""
    order = np.argsort(-np.where(truths >= 0, chances, 0.0), kind="stable")[:num_picked]
    return np.array([truths[order].sum(), len(order)], dtype=float)


def precision_metrics(counts: dict[str, NDArray[np.float64]]) -> dict[str, Weighted]:
    """Return the metrics of counts [num_proteins, 2] by definition; macro over proteins, and micro beside them."""
    metrics: dict[str, Weighted] = {}
    for name, hits_and_picks in counts.items():
        hits, picks = hits_and_picks.T
        if name in (_TAPE, _PROTEINLM):
            metrics[name] = ratio(hits, picks)
        else:
            metrics[name] = mean_ratio(hits, picks)
            metrics[f"{name}_micro"] = ratio(hits, picks)
    return metrics


def definitions() -> dict[str, str]:
    """Return {metric: what it is, in one sentence}."""
    found = {
        _TAPE: "TAPE's code, all proteins as one batch: L/5 most probable pairs with j - i >= 6; picks / pairs summed "
        "over proteins.",
        _PROTEINLM: "ProteinLM's (and TAPE's first) code: L/5 most probable entries of the symmetric map, "
        "|i - j| >= 6, so each pair twice; summed over proteins.",
    }
    for range_name, (least, end) in RANGES.items():
        reach = f"{least} <= j - i < {end}" if end else f"j - i >= {least}"
        for share_name, share in SHARES.items():
            picks = "L" if share == 1 else f"L/{share}"
            name = f"precision_at_{share_name}_{range_name}"
            found[name] = f"Share of contacts among the {picks} most probable pairs with {reach}, mean over proteins."
            found[f"{name}_micro"] = f"The same {picks} pairs a protein ({reach}), summed over proteins."
    return found
