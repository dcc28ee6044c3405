"""Losses over a block of proteins and terms, one number a protein."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LOSSES = ("bce", "contrastive")


def bce(logits: Tensor, labels: Tensor, is_known: Tensor) -> Tensor:
    """Return each protein's mean binary cross-entropy over the terms known of it, fp32 [n]; 0 where none is.

    Args:
        logits: [n, m].
        labels: Whether a protein has a term, bool [n, m].
        is_known: Whether a label counts, bool [n, m].
    """
    losses = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return (losses * is_known).sum(dim=1) / is_known.sum(dim=1).clamp(min=1)


def contrastive(logits: Tensor, labels: Tensor, is_known: Tensor) -> Tensor:
    """Return the mean of two cross-entropies for each protein, fp32 [n]: its terms among the block's, and its share in
    those of the block's terms among the proteins.

    With several positives each is held against the negatives and itself, not against the other positives (the loss of
    supervised contrastive learning, Khosla et al. 2020, with the sum outside the logarithm). What is not known is left
    out.
    """
    of_proteins = _against_negatives(logits, labels, is_known)
    of_terms = _against_negatives(logits.t(), labels.t(), is_known.t()).t()
    counts_of_proteins = labels.sum(dim=1, keepdim=True).clamp(min=1)
    num_terms = labels.any(dim=0).sum().clamp(min=1)
    counts_of_terms = labels.sum(dim=0, keepdim=True).clamp(min=1)
    by_protein = (of_proteins * labels / counts_of_proteins).sum(dim=1)
    by_term = (of_terms * labels / counts_of_terms).sum(dim=1) / num_terms * len(logits)
    return (by_protein + by_term) / 2


def _against_negatives(logits: Tensor, labels: Tensor, is_known: Tensor) -> Tensor:
    """Return, [n, m], -log(e^x / (e^x + sum of e^ the row's negatives)) of each place."""
    negatives = logits.masked_fill(labels | ~is_known, float("-inf"))
    sums = torch.logsumexp(negatives, dim=1, keepdim=True)
    return functional.softplus(sums - logits)
