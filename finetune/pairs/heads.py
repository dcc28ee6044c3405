"""From the states of a pair, read together, to the logit that its proteins bind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaprot.finetune.batch import PairBatch

PAIR_HEADS = ("interaction", "plm-interact")


class PlmInteractHead(nn.Module):
    """PLM-interact's: a linear layer on the ReLU of the first token's state (Liu et al. 2025), tensors as it names."""

    def __init__(self, encoder_size: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(encoder_size, 1)

    def forward(self, batch: PairBatch, states: Tensor) -> Tensor:
        """Return logits [num_pairs] of states [row_tokens, hidden_size]."""
        logits: Tensor = self.classifier(torch.relu(batch.first(states)))
        return logits.squeeze(1)


class InteractionHead(nn.Module):
    """The first token's state beside what the two proteins' mean states have in common.

    With a and b the means over residues: [cls, a + b, |a - b|, a * b], LayerNorm, a hidden layer with GELU. All parts
    but ``cls`` are the same for (A, B) and (B, A).
    """

    def __init__(self, encoder_size: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(4 * encoder_size),
            nn.Linear(4 * encoder_size, hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, 1),
        )

    def forward(self, batch: PairBatch, states: Tensor) -> Tensor:
        """Return logits [num_pairs] of states [row_tokens, hidden_size]."""
        first, second = batch.means(states)
        parts = (batch.first(states).float(), first + second, (first - second).abs(), first * second)
        logits: Tensor = self.layers(torch.cat(parts, dim=1).to(states.dtype))
        return logits.squeeze(1)


def pair_head(name: str, encoder_size: int, hidden_size: int, dropout: float) -> nn.Module:
    """Return a head for pairs: ``interaction`` or ``plm-interact``."""
    if name == "plm-interact":
        return PlmInteractHead(encoder_size)
    return InteractionHead(encoder_size, hidden_size, dropout)
