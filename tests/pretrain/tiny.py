"""A tiny run: configuration, corpus of real domains, packed inputs, and a world of one process for tests."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprot.common.packing import PackedBatch
from megaprot.common.sequence_readers import read_fasta
from megaprot.common.vocabulary import Vocabulary, get_vocabulary
from megaprot.pretrain import parallel
from megaprot.pretrain.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
)
from megaprot.pretrain.corpus import CorpusWriter

ROOT = Path(__file__).parents[2]
DOMAINS = ROOT / "examples" / "pfam" / "Pfam-A.cut.fasta.gz"
ESM = get_vocabulary("esm")
PADDED_SIZE = 128

_TINY = PretrainConfig(
    model=ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4),
    data=DataConfig(row_tokens=128, max_sequence_length=80),
    # An epsilon far above rounding errors: Adam would blow up those of gradients that are zero in theory (key biases).
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, epsilon=1e-4),
    train=TrainConfig(num_steps=5, global_batch_rows=4, eval_rows=6, precision="fp32"),
    run=RunConfig(timeout_minutes=5.0),
)


def tiny_config(**sections: dict[str, Any]) -> PretrainConfig:
    """The tiny run with some keys of its sections changed: ``tiny_config(model={"num_layers": 2})``."""
    changed = {name: replace(getattr(_TINY, name), **values) for name, values in sections.items()}
    return replace(_TINY, **changed)


def write_domains(folder: Path, num_sequences: int = 60, vocabulary: Vocabulary = ESM) -> Path:
    """Write corpora ``train`` and ``valid`` of the same first real domains; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid"):
        writer = CorpusWriter(folder / name, vocabulary)
        for record in itertools.islice(read_fasta(DOMAINS), num_sequences):
            writer.add(vocabulary.encode(record.sequence)[0])
        writer.finish({})
    return folder


@contextmanager
def world_of_one() -> Iterator[parallel.Place]:
    """Be the only process of a world until the end of the ``with``; the environment is left as it was."""
    before = dict(os.environ)
    with parallel.processes(ParallelConfig(), 5.0) as place:
        os.environ.clear()
        os.environ.update(before)
        yield place


def batch_of(
    sequences: Sequence[Sequence[int]],
    row_tokens: int,
    pad: int,
    device: torch.device,
    asked: Sequence[int] | None = None,
) -> PackedBatch:
    """Sequences of token ids packed one after another, logits asked for at some ascending places, else at every one."""
    tokens: list[int] = []
    positions: list[int] = []
    lengths = [len(sequence) for sequence in sequences]
    for sequence in sequences:
        tokens += sequence
        positions += range(len(sequence))
    padding = row_tokens - len(tokens)
    assert padding >= 0, "the sequences do not fit the row"
    if padding:
        tokens += [pad] * padding
        positions += [0] * padding
        lengths.append(padding)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    places = torch.arange(row_tokens, device=device) if asked is None else torch.tensor(asked, device=device)
    masked_bounds = torch.searchsorted(places, bounds).int()
    return PackedBatch(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        cu_seqlens=bounds,
        masked_positions=places,
        masked_cu_seqlens=masked_bounds,
        labels=torch.zeros_like(places),
        masked_kind=torch.zeros_like(places, dtype=torch.uint8),
        segment_lengths=tuple(lengths),
        masked_lengths=tuple(masked_bounds.diff().tolist()),
    )


def split_by_sequence(by_token: Tensor, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The parts of a [row_tokens, ...] tensor that belong to each sequence, on the CPU."""
    used = by_token[: sum(map(len, sequences))]
    return list(used.cpu().split([len(sequence) for sequence in sequences]))


def random_sequences(lengths: Sequence[int], seed: int, vocabulary: Vocabulary = ESM, mask_share: float = 0.2) -> Any:
    """Random proteins of these lengths in tokens, boundary tokens in place, some residues masked; never two alike."""
    generator = torch.Generator().manual_seed(seed)
    standard = torch.tensor(vocabulary.replacements)
    sequences = []
    for length in lengths:
        tokens = standard[torch.randint(len(standard), (length,), generator=generator)]
        tokens[torch.rand(length, generator=generator) < mask_share] = vocabulary.mask
        tokens[0] = vocabulary.begin
        if vocabulary.end >= 0:
            tokens[-1] = vocabulary.end
        sequences.append(tokens.tolist())
    return sequences
