"""Scores of any pairs of a list of proteins, by a cross-encoder or from embeddings, for prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megaprot.common.files import atomic_write
from megaprot.finetune.batch_workers import batch_workers
from megaprot.finetune.batching import BATCH_TOKENS, plan_batches
from megaprot.finetune.model_folder import FinetunedModel
from megaprot.finetune.pairs.embedding_scorer import PairScorer, Parts
from megaprot.finetune.pairs.files import PairExample, Residues
from megaprot.finetune.pairs.pair_task import PairTask
from megaprot.finetune.pairs.protein_vectors import encode_proteins
from megaprot.finetune.processes import Place

_GROUP = 256  # proteins that are encoded and kept at a time
_ROWS = 16  # of a block, for one core
_PAIRS = 1 << 15  # of a list, at a time


class PairScoring(ABC):
    """Scores pairs of proteins by their numbers.

    Attributes:
        pairs_a_part: Pairs that are scored between two writings.
    """

    pairs_a_part: int

    @abstractmethod
    def pairs(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the logits [num_pairs] of pairs of protein numbers [num_pairs, 2]."""

    @abstractmethod
    def block(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], is_wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Return the logits [num_rows, num_columns] of pairs of two sets of protein numbers, right where wanted."""


class CrossScoring(PairScoring):
    """A model that reads both proteins of a pair together.

    Args:
        tuned: The model.
        proteins: Residue ids of each protein.
        max_tokens: Tokens of a batch; 0 takes the device's default.
    """

    pairs_a_part = 1 << 9  # a minute or so of a small encoder on one core: what a killed run loses

    def __init__(self, tuned: FinetunedModel, proteins: Sequence[Residues], max_tokens: int) -> None:
        self.tuned, self.proteins = tuned, proteins
        self.max_tokens = max_tokens or BATCH_TOKENS[tuned.encoder.device.type]

    def pairs(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the logits of pairs, of which those of like length are read together."""
        task, encoder = self.tuned.task, self.tuned.encoder
        examples = [
            PairExample(number, 0, "", "", self.proteins[first], self.proteins[second], -1)
            for number, (first, second) in enumerate(places.tolist())
        ]
        lengths = [task.num_tokens(example, encoder) for example in examples]
        found = np.empty(len(examples))
        with torch.no_grad():
            for batch in plan_batches(lengths, self.max_tokens, encoder.is_padding_free):
                members = [examples[number] for number in batch]
                outputs = self.tuned.model(task.collate(encoder, members, None).to(encoder.device))
                found[batch] = [outcome["logits"].mean() for outcome in task.outcomes(outputs, members)]
        return found

    def block(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], is_wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Return the logits of the pairs that are wanted, 0 for others."""
        places = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
        found = np.zeros(is_wanted.shape, dtype=np.float32)
        found[is_wanted] = self.pairs(places[is_wanted])
        return found


class EmbeddingScoring(PairScoring):
    """A model that encodes each protein once; what each gives to its pairs is in memory.

    Args:
        scorer: The network.
        parts: Of all proteins, on the scorer's device.
    """

    pairs_a_part = 1 << 21

    def __init__(self, scorer: PairScorer, parts: Parts) -> None:
        self.scorer, self.parts = scorer, parts

    @torch.inference_mode()
    def pairs(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the logits of pairs."""
        found = np.empty(len(places))
        for start in range(0, len(places), _PAIRS):
            first, second = torch.from_numpy(places[start : start + _PAIRS].T.copy()).to(self._device)
            logits = self.scorer.combine(self.parts.take(first), self.parts.take(second))
            found[start : start + _PAIRS] = logits.double().cpu().numpy()
        return found

    def block(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], is_wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Return the logits of all pairs, some rows on each core."""
        beside = self.parts.take(torch.from_numpy(columns).to(self._device))
        chunks = [torch.from_numpy(rows[start : start + _ROWS]) for start in range(0, len(rows), _ROWS)]
        with batch_workers(self._device) as run_all:
            return np.concatenate(list(run_all(partial(self._rows, beside), chunks)))

    def _rows(self, beside: Parts, rows: torch.Tensor) -> NDArray[np.float32]:
        logits = self.scorer.block(self.parts.take(rows.to(self._device)), beside)
        found: NDArray[np.float32] = logits.float().cpu().numpy()
        return found

    @property
    def _device(self) -> torch.device:
        return self.parts.projected.device


def open_scoring(
    tuned: FinetunedModel,
    proteins: Sequence[Residues],
    folder: Path,
    place: Place,
    max_tokens: int,
    told: Callable[[int], object],
) -> PairScoring:
    """Return what scores pairs of ``proteins``; all ranks call it.

    For a model of embeddings the processes first encode the proteins, each its share, and keep what is made of them in
    ``folder``, so that a run that is started again encodes none twice.

    Args:
        tuned: A model of a task on pairs, in evaluation mode.
        proteins: Residue ids of each.
        folder: The output's folder of parts.
        place: This process.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        told: Told the number of residues that are encoded.
    """
    assert isinstance(tuned.task, PairTask)
    scorer = tuned.model.head
    if not isinstance(scorer, PairScorer):
        return CrossScoring(tuned, proteins, max_tokens)
    starts = range(0, len(proteins), _GROUP)
    for number, start in enumerate(starts):
        if number % place.world_size == place.rank:
            group = proteins[start : start + _GROUP]
            _encode_group(tuned, group, folder / f"proteins-{number:06d}.safetensors", max_tokens)
            told(sum(map(len, group)))
    place.barrier()
    return EmbeddingScoring(scorer, _read_parts(folder, len(starts), tuned.encoder.device))


@torch.inference_mode()
def _encode_group(tuned: FinetunedModel, proteins: Sequence[Residues], path: Path, max_tokens: int) -> None:
    """Write what a group of proteins gives to its pairs, unless that is done."""
    from safetensors.torch import save

    if path.is_file():
        return
    model: Any = tuned.model
    vectors = encode_proteins(tuned.encoder, proteins, model.table.longest, max_tokens).to(tuned.encoder.device)
    parts: Parts = model.head.parts(vectors)
    with atomic_write(path) as stream:
        stream.write(save({name: tensor.cpu().contiguous() for name, tensor in parts._asdict().items()}))


def _read_parts(folder: Path, num_groups: int, device: torch.device) -> Parts:
    """Return the parts of all groups as one."""
    from safetensors.torch import load_file

    groups = [load_file(folder / f"proteins-{number:06d}.safetensors") for number in range(num_groups)]
    return Parts(*(torch.cat([group[name] for group in groups]).to(device) for name in Parts._fields))
