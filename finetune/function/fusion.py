"""From a protein's and a term's vector to a score: every protein of a block with every term of it.

A block of n proteins and m terms is scored without encoding a pair: each side is projected once, and what is left to do
for a pair is little. ``concat`` is a perceptron over (p, g, abs(p - g)), its first layer split by columns so that the
parts of p and of g are computed n and m times; ``dot`` is a scaled cosine (CLIP, Radford et al. 2021; with a bias as in
SigLIP, Zhai et al. 2023); ``bilinear`` is p' W g. All have a bias by term: some functions are common.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

FUSIONS = ("dot", "bilinear", "concat")
_BLOCK_VALUES = 1 << 24
"""Numbers [rows, m, hidden_size] that ``concat`` holds at once: 64 MiB."""


class ConcatFusion(nn.Module):
    """Linear, ReLU, dropout, Linear over (p, g, \\|p - g\\|), block-wise.

    Args:
        size: Of the vectors.
        hidden_size: Of the hidden layer.
        dropout: Of the hidden layer.
    """

    def __init__(self, size: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(3 * size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden_size, 1)

    def forward(self, proteins: Tensor, terms: Tensor) -> Tensor:
        """Return logits [n, m] of vectors [n, size] and [m, size], in chunks of rows that are computed again for the
        gradients: memory grows with n x m, not with n x m x hidden_size.
        """
        of_protein, of_term, of_difference = self.first.weight.chunk(3, dim=1)
        of_proteins = functional.linear(proteins, of_protein, self.first.bias)
        of_terms = functional.linear(terms, of_term)
        width = max(of_difference.shape)
        num_rows = max(1, _BLOCK_VALUES // (len(terms) * width))
        parts = []
        for some, some_projected in zip(proteins.split(num_rows), of_proteins.split(num_rows), strict=True):
            inputs = (some, some_projected, terms, of_terms, of_difference)
            if torch.is_grad_enabled() and num_rows < len(proteins):
                parts.append(checkpoint(self._rows, *inputs, use_reentrant=False))
            else:
                parts.append(self._rows(*inputs))
        return torch.cat(parts)

    def _rows(
        self, proteins: Tensor, of_proteins: Tensor, terms: Tensor, of_terms: Tensor, of_difference: Tensor
    ) -> Tensor:
        """Return logits [rows, m] of some proteins."""
        difference = (proteins.unsqueeze(1) - terms.unsqueeze(0)).abs()
        hidden = functional.linear(difference, of_difference) + of_proteins.unsqueeze(1) + of_terms.unsqueeze(0)
        logits: Tensor = self.last(self.dropout(functional.relu(hidden))).squeeze(2)
        return logits


class DotFusion(nn.Module):
    """Cosine of the two vectors times a learned scale, and a bias read from the term's vector.

    Args:
        size: Of the vectors.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Linear(size, 1)

    def forward(self, proteins: Tensor, terms: Tensor) -> Tensor:
        """Return logits [n, m] of vectors [n, size] and [m, size]."""
        cosine = functional.normalize(proteins, dim=1) @ functional.normalize(terms, dim=1).t()
        logits: Tensor = cosine * self.log_scale.exp() + self.bias(terms).t()
        return logits


class BilinearFusion(nn.Module):
    """p' W g / sqrt(size), and a bias read from the term's vector.

    Args:
        size: Of the vectors.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(size, size, bias=False)
        self.bias = nn.Linear(size, 1)

    def forward(self, proteins: Tensor, terms: Tensor) -> Tensor:
        """Return logits [n, m] of vectors [n, size] and [m, size]."""
        logits: Tensor = proteins @ self.weight(terms).t() / math.sqrt(terms.shape[1]) + self.bias(terms).t()
        return logits


def build_fusion(name: str, size: int, hidden_size: int, dropout: float) -> nn.Module:
    """Return a fusion by its name, one of :data:`FUSIONS`."""
    if name == "concat":
        return ConcatFusion(size, hidden_size, dropout)
    return DotFusion(size) if name == "dot" else BilinearFusion(size)
