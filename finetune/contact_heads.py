"""Heads for contacts: logits [L, L] of each protein, from its attention maps or its states.

Heads return the maps of all proteins as one flat tensor, and call each of their modules once a batch: ZeRO-3 follows
the calls and outputs of modules, and asks for the same number of them on every process, which has other proteins.

* ``attention`` is ESM's contact head (Rao et al. 2021): a logistic regression on all attention maps, symmetrised and
  corrected for each residue's average, here summed layer by layer, so that no more than one layer's maps are there at a
  time.
* ``low_rank`` is a bilinear form of low-rank projections of the states with a bias for each separation.
* ``combined`` is the sum of both.
* ``tape`` is TAPE's: products and differences of two residues' states, dropout, a linear layer, the mean with the
  transpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megaprot.finetune.protein_states import Proteins

ATTENTION_SCALE = 256.0
"""Makes weights of corrected attention, mostly below 0.01, as large as others, so that one learning rate does."""
_CONTACT_LOG_ODDS = -3.0
"""About 1 pair in 20 is in contact."""
_NUM_SEPARATIONS = 64
_TAPE_DROPOUT = 0.5
_TAPE_ROWS = 64
"""Rows of the pair matrix worked on at a time."""


def split_maps(flat: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return the maps [L, L] of proteins of these lengths, which a head gave as one tensor."""
    parts = flat.split([length * length for length in lengths])
    return [part.view(length, length) for part, length in zip(parts, lengths, strict=True)]


class MapWeights(nn.Module):
    """The weight of every layer's every attention map; a module, called once a batch, so ZeRO-3 gathers it once."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads))

    def forward(self, scale: Tensor) -> Tensor:
        """Return the weights times a number [], fp32 [num_layers, heads]."""
        return self.weight.float() * scale


def weighed_maps(maps: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of attention maps, symmetrised and less their average product (Dunn et al. 2008).

    A map A gives S = A + A', and S - r r' / t with r the sums of its rows and t that of all of it. Weights come first,
    so that no other arrays of a map's size are made or kept for the gradient.

    Args:
        maps: [num_proteins, heads, L, L].
        weight: fp32 [heads].

    Returns:
        fp32 [num_proteins, L, L].
    """
    weighed = torch.einsum("h,nhij->nij", weight.to(maps.dtype), maps).float()
    sums_nhl = (maps.sum(-1) + maps.sum(-2)).float()
    shares_nh = weight / sums_nhl.sum(-1)
    average = (sums_nhl * shares_nh.unsqueeze(-1)).transpose(1, 2) @ sums_nhl
    return weighed + weighed.transpose(1, 2) - average


class AttentionSum:
    """Gathers what attention says of each pair while the encoder runs.

    Args:
        head: The head whose regression weighs the maps.
        proteins: What the encoder reads.
    """

    def __init__(self, head: AttentionContactHead, proteins: Proteins) -> None:
        self.head, self.proteins = head, proteins
        self.sums: dict[int, Tensor] = {}
        scale = torch.tensor(ATTENTION_SCALE, device=proteins.read.tokens.device)
        self.weights: Tensor = head.weights(scale)

    def add(self, layer: int, first: int, maps: Tensor) -> None:
        """Add one layer's maps [count, heads, length, length] of neighbouring sequences, boundary tokens included."""
        start = 1  # behind the boundary token that every vocabulary has
        end = start + self.proteins.num_read[first]
        with torch.set_grad_enabled(self.head.training):
            for place, logits in enumerate(
                weighed_maps(maps[:, :, start:end, start:end], self.weights[layer]), start=first
            ):
                self.sums[place] = self.sums[place] + logits if place in self.sums else logits

    def logits(self) -> list[Tensor]:
        """Return the sums of whole proteins [L, L]: in windows' overlaps their mean, 0 where no window saw a pair."""
        if self.proteins.read is self.proteins.whole:
            return [self.sums[number] for number in range(len(self.sums))]
        totals = [torch.zeros(length, length, device=self.sums[0].device) for length in self.proteins.num_residues]
        counts = [torch.zeros_like(total) for total in totals]
        for number, (owner, start) in enumerate(self.proteins.cuts):
            window = slice(start, start + len(self.sums[number]))
            totals[owner][window, window] += self.sums[number].float()
            counts[owner][window, window] += 1
        return [total / count.clamp(min=1) for total, count in zip(totals, counts, strict=True)]


class AttentionContactHead(nn.Module):
    """Logistic regression on attention maps; needs them while the encoder runs (:class:`AttentionSum`)."""

    def __init__(self, num_layers: int, num_heads: int, bias: float = _CONTACT_LOG_ODDS) -> None:
        super().__init__()
        self.weights = MapWeights(num_layers, num_heads)
        self.bias = nn.Parameter(torch.full((1,), bias))

    def forward(self, proteins: Proteins, states: Tensor, attention: AttentionSum) -> Tensor:
        """Return symmetric logits [L, L] of each protein, flat."""
        return torch.cat([logits.float().flatten() for logits in attention.logits()]) + self.bias.float()


class LowRankContactHead(nn.Module):
    """Bilinear form of two projections of the states, made symmetric, with a bias for each separation."""

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(hidden_size), nn.Dropout(dropout), nn.Linear(hidden_size, 2 * rank))
        self.separation = nn.Embedding(_NUM_SEPARATIONS, 1)
        nn.init.constant_(self.separation.weight, _CONTACT_LOG_ODDS)

    def forward(self, proteins: Proteins, states: Tensor, attention: None) -> Tensor:
        """Return symmetric logits [L, L] of each protein, flat."""
        found = []
        # Once a batch, not once a protein: ZeRO-3 gathers weights at each call, and other processes have more or fewer.
        bias = self.separation(torch.arange(_NUM_SEPARATIONS, device=states.device)).squeeze(1)
        for part in proteins.whole.residues(self.project(states)):
            left, right = part.chunk(2, dim=1)
            product = left @ right.t() / left.shape[1] ** 0.5
            places = torch.arange(len(part), device=part.device)
            apart = (places[:, None] - places[None, :]).abs().clamp(max=_NUM_SEPARATIONS - 1)
            found.append(((product + product.t()) / 2 + bias[apart]).float().flatten())
        return torch.cat(found)


class CombinedContactHead(nn.Module):
    """The sum of ``attention`` and ``low_rank``: what attention shows of pairs, and what states say of them."""

    def __init__(self, num_layers: int, num_heads: int, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.attention = AttentionContactHead(num_layers, num_heads, bias=0.0)  # the other has one a separation
        self.low_rank = LowRankContactHead(hidden_size, rank, dropout)

    def forward(self, proteins: Proteins, states: Tensor, attention: AttentionSum) -> Tensor:
        """Return symmetric logits [L, L] of each protein, flat."""
        logits: Tensor = self.attention(proteins, states, attention) + self.low_rank(proteins, states, None)
        return logits


class _LinearWeights(nn.Linear):
    """A linear layer that gives its weights, once a batch, to be used as often as there are proteins."""

    def forward(self, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return weight and bias times a number []."""
        return self.weight * scale, self.bias * scale


class TapeContactHead(nn.Module):
    """TAPE's ``PairwiseContactPredictionHead``, a block of rows at a time, so that long proteins fit into memory."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = _LinearWeights(2 * hidden_size, 2)

    def forward(self, proteins: Proteins, states: Tensor, attention: None) -> Tensor:
        """Return symmetric logits [L, L] of each protein, flat: those of class 1 less those of class 0."""
        found = []
        weights = self.linear(states.new_ones(()))
        for part in proteins.whole.residues(states):
            blocks = [
                checkpoint(self._pairs, rows, part, *weights, use_reentrant=False)
                if self.training
                else self._pairs(rows, part, *weights)
                for rows in part.split(_TAPE_ROWS)
            ]
            both = torch.cat([block for block in blocks if block is not None]).float()
            both = (both + both.transpose(0, 1)) / 2
            found.append((both[:, :, 1] - both[:, :, 0]).flatten())
        return torch.cat(found)

    def _pairs(self, rows: Tensor, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return [num_rows, num_columns, 2] of two sets of states."""
        product = rows[:, None, :] * columns[None, :, :]
        difference = rows[:, None, :] - columns[None, :, :]
        features = functional.dropout(torch.cat((product, difference), dim=-1), _TAPE_DROPOUT, self.training)
        return functional.linear(features, weight, bias)


def contact_head(name: str, hidden_size: int, num_layers: int, num_heads: int, rank: int, dropout: float) -> nn.Module:
    """Return a head for contacts: ``combined``, ``attention``, ``low_rank`` or ``tape``."""
    if name == "combined":
        return CombinedContactHead(num_layers, num_heads, hidden_size, rank, dropout)
    if name == "attention":
        return AttentionContactHead(num_layers, num_heads)
    if name == "tape":
        return TapeContactHead(hidden_size)
    return LowRankContactHead(hidden_size, rank, dropout)
