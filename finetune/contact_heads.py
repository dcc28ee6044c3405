"""Heads for contacts: logits [L, L] of each protein, from its attention maps or its states.

``attention`` is ESM's contact head (Rao et al. 2021): a logistic regression on all attention maps, symmetrised and
corrected for each residue's average, here summed layer by layer, so that no more than one layer's maps are there at a
time. ``low_rank`` is a bilinear form of low-rank projections of the states with a bias for each separation. ``tape`` is
TAPE's: products and differences of two residues' states, dropout, a linear layer, the mean with the transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaprot.finetune.protein_states import Proteins

_ATTENTION_SCALE = 32.0
"""Brings corrected attention, mostly below 0.1, to the size of other inputs."""
_CONTACT_LOG_ODDS = -3.0
"""About 1 pair in 20 is in contact."""
_NUM_SEPARATIONS = 64
_TAPE_ROWS = 64
"""Rows of the pair matrix worked on at a time."""


class MapRegression(nn.Module):
    """The weighted sum of one layer's attention maps, symmetrised and less their average product (Dunn et al. 2008).

    A map A gives S = A + A', and S - r r' / t with r the sums of its rows and t that of all of it. Weights come first,
    so that no other arrays of a map's size are made or kept for the gradient.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads))

    def forward(self, maps: Tensor) -> Tensor:
        """Return [num_proteins, L, L] of maps [num_proteins, heads, L, L]."""
        weight = _ATTENTION_SCALE * self.weight.float()
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

    def add(self, layer: int, first: int, maps: Tensor) -> None:
        """Add one layer's maps [count, heads, length, length] of neighbouring sequences, boundary tokens included."""
        start = 1  # behind the boundary token that every vocabulary has
        end = start + self.proteins.num_read[first]
        with torch.set_grad_enabled(self.head.training):
            for place, logits in enumerate(self.head.layers[layer](maps[:, :, start:end, start:end]), start=first):
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

    def __init__(self, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MapRegression(num_heads) for _ in range(num_layers))
        self.bias = nn.Parameter(torch.full((1,), _CONTACT_LOG_ODDS))

    def forward(self, proteins: Proteins, states: Tensor, attention: AttentionSum) -> list[Tensor]:
        """Return symmetric logits [L, L] of each protein."""
        return [logits.float() + self.bias.float() for logits in attention.logits()]


class LowRankContactHead(nn.Module):
    """Bilinear form of two projections of the states, made symmetric, with a bias for each separation."""

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(hidden_size), nn.Dropout(dropout), nn.Linear(hidden_size, 2 * rank))
        self.separation = nn.Embedding(_NUM_SEPARATIONS, 1)
        nn.init.constant_(self.separation.weight, _CONTACT_LOG_ODDS)

    def forward(self, proteins: Proteins, states: Tensor, attention: None) -> list[Tensor]:
        """Return symmetric logits [L, L] of each protein."""
        found = []
        for part in proteins.whole.residues(self.project(states)):
            left, right = part.chunk(2, dim=1)
            product = left @ right.t() / left.shape[1] ** 0.5
            places = torch.arange(len(part), device=part.device)
            apart = (places[:, None] - places[None, :]).abs().clamp(max=_NUM_SEPARATIONS - 1)
            found.append(((product + product.t()) / 2 + self.separation(apart).squeeze(2)).float())
        return found


class TapeContactHead(nn.Module):
    """TAPE's ``PairwiseContactPredictionHead``, a block of rows at a time, so that long proteins fit into memory."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(2 * hidden_size, 2)

    def forward(self, proteins: Proteins, states: Tensor, attention: None) -> list[Tensor]:
        """Return symmetric logits [L, L] of each protein: those of class 1 less those of class 0."""
        found = []
        for part in proteins.whole.residues(states):
            blocks = [
                checkpoint(self._pairs, rows, part, use_reentrant=False) if self.training else self._pairs(rows, part)
                for rows in part.split(_TAPE_ROWS)
            ]
            both = torch.cat([block for block in blocks if block is not None]).float()
            both = (both + both.transpose(0, 1)) / 2
            found.append(both[:, :, 1] - both[:, :, 0])
        return found

    def _pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return [num_rows, num_columns, 2] of two sets of states."""
        product = rows[:, None, :] * columns[None, :, :]
        difference = rows[:, None, :] - columns[None, :, :]
        outputs: Tensor = self.linear(self.dropout(torch.cat((product, difference), dim=-1)))
        return outputs


def contact_head(
    name: str, hidden_size: int, num_layers: int, num_heads: int, rank: int, dropout: float
) -> AttentionContactHead | LowRankContactHead | TapeContactHead:
    """Return a head for contacts: ``attention``, ``low_rank`` or ``tape``."""
    if name == "attention":
        return AttentionContactHead(num_layers, num_heads)
    if name == "tape":
        return TapeContactHead(hidden_size)
    return LowRankContactHead(hidden_size, rank, dropout)
