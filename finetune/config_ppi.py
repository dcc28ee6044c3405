"""Settings of the tasks on protein pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class PpiConfig:
    """How pairs are read, masked and scored.

    Attributes:
        max_length: Most tokens of a pair, boundary tokens included; 0 takes what the encoder takes.
        long_pairs: What is done with longer pairs: ``truncate`` the longer protein first, or read ``windows``.
        symmetric: Score both orders and average.
        mask_rate: Share of the residues that are masked in training.
        mlm_weight: Weight of the masked-language loss; 0 leaves it out.
        class_weight: Weight of the classification loss.
        pos_weight: Weight of positive pairs in it; 0 takes negatives / positives of the training split.
    """

    max_length: int = 0
    long_pairs: Literal["truncate", "windows"] = "truncate"
    symmetric: bool = True
    mask_rate: float = 0.15
    mlm_weight: float = 1.0
    class_weight: float = 10.0
    pos_weight: float = 0.0
