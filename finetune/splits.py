"""The splits a run reads: opened, checked against each other, and drawn from where fewer examples are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megaprot.common.errors import InputError
from megaprot.finetune.config import FinetuneConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.task import Task
from megaprot.finetune.tasks import open_task


def prepare(config: FinetuneConfig, encoder: Encoder) -> tuple[Task, list[Any], list[Any]]:
    """Return the task, and the training and validation splits as this run uses them.

    Raises:
        InputError: The task, its head, the data or a record is wrong.
    """
    data = Path(config.data)
    task = open_task(config.task, config.labels)
    task.head_name(config.head)
    task.configure(config)
    splits: dict[str, list[Any]] = {}
    for name in ("train", "valid"):
        place = task.place_of(data, name)
        splits[name] = task.read(data, name, encoder.vocabulary)
        if name == "train":
            task.learn(splits[name], config.head)
        task.check(splits[name], place)
        if not sum(map(task.weight, splits[name])):
            raise InputError(f"{place} holds no label that counts in the split '{name}'; give the task's data.")
    train_examples = task.training_examples(sampled(splits["train"], config.train.train_examples, config.seed))
    return task, train_examples, sampled(splits["valid"], config.train.valid_examples, 0)


def sampled(examples: list[Any], count: int, seed: int) -> list[Any]:
    """Return ``count`` examples drawn by a seed, in their order; all for 0."""
    if not count or count >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng(seed).choice(len(examples), count, replace=False))
    return [examples[place] for place in chosen.tolist()]
