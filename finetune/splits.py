"""The splits a run reads: opened, checked against each other, and drawn from where fewer proteins are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaprot.common.errors import InputError
from megaprot.finetune.config import FinetuneConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.examples import Example, find_split, read_examples
from megaprot.finetune.task import Task
from megaprot.finetune.tasks import open_task


def prepare(config: FinetuneConfig, encoder: Encoder) -> tuple[Task, list[Example], list[Example]]:
    """Return the task, and the training and validation splits as this run uses them.

    Raises:
        InputError: The task, its head, the data or a record is wrong.
    """
    task = open_task(config.task, config.labels)
    task.head_name(config.head)
    splits: dict[str, list[Example]] = {}
    for name in ("train", "valid"):
        split = find_split(Path(config.data), task.folder, name)
        splits[name] = read_examples(split, config.labels, encoder.vocabulary, task.label_of)
        if name == "train":
            task.learn(splits[name], config.head)
        task.check(splits[name], str(split.path))
        if not sum(map(task.weight, splits[name])):
            raise InputError(f"{split.path} holds no label that counts in the split '{name}'; give the task's data.")
    train_examples = sampled(splits["train"], config.train.train_examples, config.seed)
    return task, train_examples, sampled(splits["valid"], config.train.valid_examples, 0)


def sampled(examples: list[Example], count: int, seed: int) -> list[Example]:
    """Return ``count`` proteins drawn by a seed, in their order; all for 0."""
    if not count or count >= len(examples):
        return examples
    chosen = np.sort(np.random.default_rng(seed).choice(len(examples), count, replace=False))
    return [examples[place] for place in chosen.tolist()]
