"""Which proteins a step takes, and how each process reads them: a pure function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megaprot.finetune.batching import BATCH_TOKENS, plan_batches

_TRAINING_TOKENS = {"cpu": 2 * BATCH_TOKENS["cpu"], "cuda": BATCH_TOKENS["cuda"] // 2}


@dataclass(frozen=True)
class MicroBatch:
    """Proteins that go through the encoder at once.

    Attributes:
        members: Their places in the split.
        is_blank: Whether they only keep this process in step with the others: no loss, no outcome.
    """

    members: tuple[int, ...]
    is_blank: bool = False


class Order:
    """The order in which a training split is read, another permutation each epoch.

    Args:
        num_examples: Proteins of the split.
        batch_size: Proteins of a step; the last step of an epoch has what is left.
        seed: Of the permutations.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.steps_per_epoch = math.ceil(num_examples / batch_size)

    def members(self, step: int) -> list[int]:
        """Return the places of the proteins of a step, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        chosen: list[int] = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        return chosen


def share(
    members: Sequence[int], lengths: Sequence[int], max_tokens: int, is_padding_free: bool, rank: int, world_size: int
) -> list[MicroBatch]:
    """Return the micro-batches of one process; all processes get the same number of them.

    Sharded weights (ZeRO-3) are gathered in every forward pass, so a process without proteins of its own repeats some
    as a blank. Together the processes read each protein once.

    Args:
        members: Places of the proteins.
        lengths: Tokens of each protein of the split, boundary tokens included.
        max_tokens: Most tokens of a micro-batch; a longer protein is one of its own.
        is_padding_free: Whether the encoder needs no padding.
        rank: This process.
        world_size: All processes.
    """
    own = [lengths[member] for member in members]
    budget = min(max_tokens, max(max(own), math.ceil(sum(own) / world_size)))
    batches = [
        MicroBatch(tuple(members[place] for place in batch)) for batch in plan_batches(own, budget, is_padding_free)
    ]
    while len(batches) % world_size:
        batches.append(MicroBatch(batches[-1].members, is_blank=True))
    return batches[rank::world_size]


def training_tokens(max_tokens: int, device_type: str) -> int:
    """Return the most tokens of a training micro-batch, the default of the device where none is given."""
    return max_tokens or _TRAINING_TOKENS[device_type]
