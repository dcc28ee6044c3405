"""Protein-protein interaction from embeddings: each protein is encoded once, pairs are scored by a small network.

The frozen-encoder kind of system (TUnA, Ko et al. 2024): N + M passes of the encoder for N x M pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.config import FinetuneConfig, HeadConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.pairs.embedding_scorer import PairScorer
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.pairs.pair_task import PairTask
from megaprot.finetune.pairs.protein_vectors import FeatureTable, num_features
from megaprot.finetune.task import Outcome


@dataclass(frozen=True)
class Places:
    """Numbers of pairs' proteins in the table of features, int64 [num_pairs] each."""

    first: Tensor
    second: Tensor

    def to(self, device: torch.device) -> Places:
        """Return the same on a device."""
        return Places(self.first.to(device), self.second.to(device))


class EmbeddingModel(nn.Module):
    """A frozen encoder, what it has made of all proteins so far, and the scorer.

    Args:
        encoder: Reads each protein once.
        head: Scores pairs of vectors.
        table: Keeps the vectors.
    """

    is_frozen = True

    def __init__(self, encoder: Encoder, head: PairScorer, table: FeatureTable) -> None:
        super().__init__()
        self.encoder, self.head, self.table = encoder.requires_grad_(False), head, table

    def train(self, mode: bool = True) -> EmbeddingModel:
        """Switch the scorer's dropout on or off; the encoder has none."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, places: Places) -> Tensor:
        """Return the logits [num_pairs], fp32."""
        vectors = self.table.fill(self.encoder)
        if not self.head.is_standardised:
            self.head.standardise(vectors[torch.from_numpy(self.table.training).to(vectors.device)])
        met, numbers = torch.unique(torch.stack((places.first, places.second)), return_inverse=True)
        parts = self.head.parts(vectors[met])  # a protein that is in many pairs of the batch once
        return self.head.combine(parts.take(numbers[0]), parts.take(numbers[1])).float()


class PpiEmbedding(PairTask):
    """Binary cross-entropy on pairs of protein vectors."""

    name = "ppi_embedding"
    heads = ("symmetric",)

    def __init__(self, labels: Any) -> None:
        super().__init__(labels)
        self.table = FeatureTable()
        self._how: tuple[str, str, int] | None = None

    def configure(self, config: FinetuneConfig) -> None:
        """Raise InputError for what an encoder that only reads cannot do."""
        super().configure(config)
        if config.tuning.mode != "frozen":
            raise InputError(f"--tuning.mode {config.tuning.mode}: the task ppi_embedding encodes each protein once, "
                             "its encoder cannot learn; give --tuning.mode frozen, or --task ppi.")  # fmt: skip
        if config.engine.zero_stage == 3:
            raise InputError("--engine.zero_stage 3: the task ppi_embedding needs no sharded weights; give 0.")
        how = (config.model, config.train.precision, config.ppi.max_length)
        if how != self._how:  # one of several runs on the same proteins, with other vectors
            self.table, self._how = self.table.emptied(config.ppi.max_length), how

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        super().restore(state)
        self.table.longest = self.settings.max_length

    def read(self, data: Path, split: str, vocabulary: Vocabulary) -> list[PairExample]:
        """Return the pairs of a split; its proteins are encoded with the first batch, on all processes together."""
        examples = super().read(data, split, vocabulary)
        self.table.index.places(examples)
        return examples

    def learn(self, examples: Sequence[PairExample], config: HeadConfig) -> None:
        """Take the training split; the scorer standardises by its proteins."""
        super().learn(examples, config)
        self.table.training = np.unique(self.table.index.places(examples))

    def num_tokens(self, example: PairExample, encoder: Encoder) -> int:
        """Return 1: what costs time in a step is the number of pairs."""
        return 1

    def collate(self, encoder: Encoder, examples: Sequence[Any], seed: int | None) -> Places:
        """Return the numbers of the pairs' proteins."""
        places = torch.from_numpy(self.table.index.places(examples))
        return Places(places[:, 0], places[:, 1])

    def build_head(self, config: HeadConfig, encoder: Encoder) -> PairScorer:
        """Return the scorer."""
        self.head_name(config)
        return PairScorer(num_features(encoder), config.hidden_size, config.dropout)

    def build_model(self, encoder: Encoder, head: Any, is_frozen: bool) -> EmbeddingModel:
        """Return encoder, table and scorer as one module."""
        return EmbeddingModel(encoder, head, self.table)

    def loss(self, outputs: Tensor, examples: Sequence[PairExample]) -> Tensor:
        """Return the sum of the binary cross-entropies."""
        return self.class_loss(outputs, examples)

    def outcomes(self, outputs: Tensor, examples: Sequence[PairExample]) -> list[Outcome]:
        """Return each pair's logit, the same for both orders."""
        return [{"logits": value} for value in outputs.cpu().numpy().astype(np.float64)[:, None]]


TASK = PpiEmbedding
