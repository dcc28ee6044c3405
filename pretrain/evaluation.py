"""Masked-language-model loss over a fixed set of rows: in training, and of any checkpoint on any corpus."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
from megatron.core.distributed import DistributedDataParallel

from megaprot.common import heartbeat
from megaprot.pretrain import checkpoint
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.loading import iterate_validation
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.step import Tally, evaluate_rows
from megaprot.pretrain.stream import ValidationStream
from megaprot.pretrain.validation import row_shape_of

# Rows a rank and pipeline stage in one batch: enough to fill the pipeline, few blank rows at the end.
_BATCH_ROWS = 4


def add_tallies(first: Tally, second: Tally) -> Tally:
    """Return the sums of both."""
    return Tally(*(getattr(first, part.name) + getattr(second, part.name) for part in fields(Tally)))


def evaluate_stream(
    chunks: list[DistributedDataParallel], stream: ValidationStream, config: PretrainConfig, place: Place
) -> Tally:
    """Return the tally over all rows of a validation stream; all ranks call it and get the same."""
    batch_rows = place.data_size * config.parallel.pipeline * _BATCH_ROWS
    total = Tally()
    for rows in iterate_validation(stream, batch_rows, place.data_rank, place.data_size, 0):
        total = add_tallies(total, evaluate_rows(chunks, rows, place))
        heartbeat.progress()
    return total


def residue_frequency_perplexity(corpus: Corpus) -> float:
    """Return the perplexity of guessing residues by their frequencies in ``corpus``: what no context at all gives."""
    counts = np.bincount(corpus.residues).astype(float)
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def evaluate_checkpoint(
    folder: Path, config: PretrainConfig, corpus: Corpus, max_rows: int, place: Place
) -> dict[str, float]:
    """Return loss and perplexities of a complete checkpoint on a corpus, masks fixed by each sequence alone.

    Args:
        folder: The checkpoint.
        config: What it was trained with, its layout replaced by the present one.
        corpus: What to measure on.
        max_rows: Rows to use; 0 means all.
        place: Where this process stands.
    """
    chunks = build_model(config, transformer_config(config), corpus.vocabulary, place)
    checkpoint.load(folder, chunks)
    shape = row_shape_of(config.data, config.parallel.tensor, config.train.fp8)
    stream = ValidationStream([corpus], shape, max_rows=max_rows)
    tally = evaluate_stream(chunks, stream, config, place)
    return {
        "loss": tally.mean_loss,
        "perplexity": tally.perplexity,
        "mask_perplexity": tally.mask_perplexity,
        "masked_accuracy": tally.accuracy,
        "masked_positions": tally.count,
        "residue_frequency_perplexity": residue_frequency_perplexity(corpus),
    }
