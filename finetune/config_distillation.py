"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossConfig:
    """What the student learns from.

    Attributes:
        temperature: Of both distributions in the divergence.
        logits_weight: Weight of the divergence from the teacher's distribution, times the temperature's square.
        hidden_weight: Weight of the difference of hidden states.
        truth_weight: Weight of the cross-entropy with the true residues.
        mask_rate: Share of the residues that are masked.
    """

    temperature: float = 2.0
    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    truth_weight: float = 1.0
    mask_rate: float = 0.15
