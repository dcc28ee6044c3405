"""Settings of the tasks on protein pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class PpiConfig:
    """How pairs are read, masked and scored.

    Attributes:
        max_length: Most tokens of a pair, boundary tokens included; 0 takes what the encoder takes.
        long_pairs: What the task ``ppi`` does with longer pairs: ``truncate`` cuts the longer protein first;
            ``windows`` reads one pair of windows, another each step, in training and joins all of them in scoring.
        symmetric: Score both orders and average; training reads both in any case.
        mask_rate: Share of the residues that the task ``ppi`` masks in training.
        mlm_weight: Weight of its masked-language loss; 0 leaves it out.
        class_weight: Weight of its classification loss.
        pos_weight: Weight of positive pairs in the classification loss; 0 takes negatives / positives of the training
            split.
    """

    max_length: int = 0
    long_pairs: Literal["truncate", "windows"] = "truncate"
    symmetric: bool = True
    mask_rate: float = 0.15
    mlm_weight: float = 1.0
    class_weight: float = 10.0
    pos_weight: float = 0.0
