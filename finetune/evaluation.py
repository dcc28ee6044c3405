"""Predictions for a whole split on all processes, each example once, and metrics over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megaprot.finetune.batching import BATCH_TOKENS
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.metrics import Metric, with_intervals
from megaprot.finetune.micro_batches import share
from megaprot.finetune.processes import Place
from megaprot.finetune.task import Outcome, Task


@dataclass(frozen=True)
class Evaluated:
    """What came out of a split; only rank 0 has the outcomes.

    Attributes:
        loss: Mean loss over all labels; nan without labels.
        outcomes: One an example, in the split's order; with labels as the task has joined them.
    """

    loss: float
    outcomes: Any


def run_split(
    task: Task,
    encoder: Encoder,
    forward: Callable[[Any], Any],
    examples: Sequence[Any],
    place: Place,
    max_tokens: int = 0,
    has_labels: bool = True,
    told: Callable[[int], object] = lambda _: None,
) -> Evaluated:
    """Return the predictions for examples; all ranks call it with the same ones.

    Args:
        task: Gives loss and outcomes.
        encoder: Says how they are read.
        forward: From what the task collates, on the device, to outputs, in evaluation mode.
        examples: The split.
        place: This process.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        has_labels: Whether losses are taken.
        told: Told the number of residues of each batch that is done.
    """
    lengths = [task.num_tokens(example, encoder) for example in examples]
    budget = max_tokens or BATCH_TOKENS[place.device.type]
    batches = share(range(len(examples)), lengths, budget, encoder.is_padding_free, place.rank, place.world_size)
    found: dict[int, Outcome] = {}
    loss = weight = 0.0
    with torch.no_grad():
        for batch in batches:
            members = [examples[member] for member in batch.members]
            outputs = forward(task.collate(encoder, members, None).to(place.device))
            if batch.is_blank:
                continue
            if has_labels:
                loss += float(task.loss(outputs, members))
                weight += sum(map(task.weight, members))
            found |= dict(zip(batch.members, task.outcomes(outputs, members), strict=True))
            told(sum(map(task.num_residues, members)))
    total_loss, total_weight = place.sum([loss, weight])
    gathered: dict[int, Outcome] = {}
    for part in place.to_main(found):
        gathered |= part
    outcomes: Any = [gathered[number] for number in range(len(examples))] if place.is_main else []
    if has_labels and place.is_main:
        outcomes = task.joined(examples, outcomes)
    return Evaluated(total_loss / total_weight if total_weight else float("nan"), outcomes)


def split_metrics(task: Task, examples: Sequence[Any], evaluated: Evaluated, num_samples: int) -> dict[str, Metric]:
    """Return the task's metrics over a split, with bootstrap intervals of ``num_samples`` samples (0: none)."""
    return with_intervals(task.metrics(examples, evaluated.outcomes), len(examples), num_samples)
