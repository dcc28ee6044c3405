"""A small symmetric network on the vectors of two proteins, cut so that a protein's part is computed once.

With N + M proteins for N x M pairs, nearly all of the work is in what depends on both. Of the symmetric sum, absolute
difference and product of two projected vectors (Conneau et al. 2017), the linear layer on the sum is a sum of parts of
one protein each; a bilinear form of low rank is a matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 128
"""Of a protein's projection; what depends on both proteins of a pair costs time with it."""
INNER_SIZE = 64
RANK = 32
_CHUNK = 2048  # proteins beside one: what is in between stays in a core's cache


class Parts(NamedTuple):
    """What one protein gives to all of its pairs.

    Attributes:
        projected: [num_proteins, WIDTH].
        summed: Its share of the inner layer [num_proteins, INNER_SIZE].
        factors: Of the bilinear form [num_proteins, RANK].
    """

    projected: Tensor
    summed: Tensor
    factors: Tensor

    def take(self, rows: slice | Tensor) -> Parts:
        """Return the parts of some proteins."""
        return Parts(self.projected[rows], self.summed[rows], self.factors[rows])


class PairScorer(nn.Module):
    """Logits of pairs of protein vectors, the same for both orders.

    Args:
        num_features: Length of a protein's vector.
        hidden_size: Width of the layer between a vector and its projection.
        dropout: On the vectors, that layer and the inner one.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, num_features: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("spread", torch.zeros(num_features))
        self.project = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(num_features, hidden_size), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden_size, WIDTH), nn.LayerNorm(WIDTH),
        )  # fmt: skip
        self.of_sum = nn.Linear(WIDTH, INNER_SIZE)
        self.of_difference = nn.Linear(WIDTH, INNER_SIZE, bias=False)
        self.of_product = nn.Linear(WIDTH, INNER_SIZE, bias=False)
        self.factor = nn.Linear(WIDTH, RANK, bias=False)
        self.scales = nn.Parameter(torch.tensor([1.0, -1.0]).repeat(RANK // 2) / RANK)
        self.inner_dropout = nn.Dropout(dropout)
        self.out = nn.Linear(INNER_SIZE, 1)

    @property
    def is_standardised(self) -> bool:
        """Whether mean and spread have been taken."""
        return bool((self.spread > 0).any())

    def standardise(self, vectors: Tensor) -> None:
        """Take mean and spread of the training proteins' vectors [num_proteins, num_features]."""
        self.mean.copy_(vectors.mean(dim=0))
        self.spread.copy_(vectors.std(dim=0, unbiased=False).clamp(min=1e-4))

    def parts(self, vectors: Tensor) -> Parts:
        """Return the parts of proteins with ``vectors`` [num_proteins, num_features]."""
        standard = ((vectors - self.mean) / self.spread).to(self.out.weight.dtype)
        projected = self.project(standard)
        return Parts(projected, self.of_sum(projected), self.factor(projected))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the logits [num_pairs] of pairs of vectors [num_pairs, num_features]."""
        return self.combine(self.parts(first), self.parts(second))

    def combine(self, first: Parts, second: Parts) -> Tensor:
        """Return the logits of pairs of parts, whose leading dimensions broadcast."""
        difference = self.of_difference((first.projected - second.projected).abs())
        inner = first.summed + second.summed + difference + self.of_product(first.projected * second.projected)
        bilinear = (first.factors * second.factors) @ self.scales
        logits: Tensor = self.out(self.inner_dropout(functional.gelu(inner))).squeeze(-1) + bilinear
        return logits

    @torch.inference_mode()
    def block(self, rows: Parts, columns: Parts) -> Tensor:
        """Return the logits [num_rows, num_columns] of all pairs of two sets of proteins."""
        found = (rows.factors * self.scales) @ columns.factors.T
        for start in range(0, len(columns.projected), _CHUNK):
            chunk = columns.take(slice(start, start + _CHUNK))
            for row, (projected, summed) in enumerate(zip(rows.projected, rows.summed, strict=True)):
                inner = chunk.summed + summed
                inner = torch.addmm(inner, (chunk.projected - projected).abs_(), self.of_difference.weight.T)
                inner = torch.addmm(inner, chunk.projected, (self.of_product.weight * projected).T)
                found[row, start : start + _CHUNK] += self.out(functional.gelu(inner)).squeeze(1)
        return found
