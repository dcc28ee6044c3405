"""One vector a protein from an encoder that only reads, made once and kept: means of the states of several layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megaprot.common.errors import RunError
from megaprot.finetune.batch import pack
from megaprot.finetune.batch_workers import batch_workers
from megaprot.finetune.batching import BATCH_TOKENS, plan_batches
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.pairs.proteins import ProteinIndex

LONGEST = 1024
"""Residues read at once where neither the encoder nor the run says how many: attention's time grows with the square."""


def feature_layers(encoder: Encoder) -> tuple[int, ...]:
    """Return the layers whose states are averaged: the embeddings, two within and the last."""
    inner = {round(encoder.num_layers * share) for share in (1 / 3, 2 / 3)} - {0, encoder.num_layers}
    return (0, *sorted(inner), -1)


def num_features(encoder: Encoder) -> int:
    """Return the length of a protein's vector."""
    return len(feature_layers(encoder)) * encoder.hidden_size + 1


@torch.inference_mode()
def encode_proteins(
    encoder: Encoder,
    proteins: Sequence[NDArray[np.integer]],
    longest: int = 0,
    max_tokens: int = 0,
    told: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Return a vector for each protein, fp32 [num_proteins, num_features] on the CPU.

    A vector holds the means over residues of the states after each of :func:`feature_layers`, and the logarithm of
    their number. A longer protein than ``longest`` is read in stretches of about one length, side by side: each residue
    counts once.

    Args:
        encoder: In evaluation mode.
        proteins: Residue ids of each.
        longest: Most residues read at once; 0 takes what the encoder takes, 1,024 where that is any number.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        told: Told the number of residues of each batch that is done.

    Raises:
        RunError: A value is not finite.
    """
    most = min(longest or LONGEST, encoder.longest) if encoder.longest else longest or LONGEST
    pieces = [
        (owner, start, end) for owner, residues in enumerate(proteins) for start, end in _stretches(len(residues), most)
    ]
    lengths = [end - start + encoder.vocabulary.num_boundary_tokens for _, start, end in pieces]
    batches = plan_batches(lengths, max_tokens or BATCH_TOKENS[encoder.device.type], encoder.is_padding_free)
    layers = feature_layers(encoder)
    sums = torch.zeros(len(proteins), num_features(encoder) - 1)
    totals = torch.zeros(len(proteins), 1)
    with batch_workers(encoder.device) as run_all:
        found = run_all(partial(_means, encoder, layers, proteins, pieces), batches)
        for batch, means in zip(batches, found, strict=True):
            for number, mean in zip(batch, means, strict=True):
                owner, start, end = pieces[number]
                sums[owner] += mean * (end - start)
                totals[owner] += end - start
            told(sum(pieces[number][2] - pieces[number][1] for number in batch))
    sizes = torch.tensor([[float(len(residues))] for residues in proteins]).view(-1, 1)
    vectors = torch.cat((sums / totals, sizes.log()), dim=1)
    if not bool(torch.isfinite(vectors).all()):
        raise RunError("the encoder gives values that are not finite; check its weights.")
    return vectors


def _stretches(num_residues: int, most: int) -> list[tuple[int, int]]:
    """Return the fewest stretches [start, end) of at most ``most`` residues, whose lengths differ by one at most."""
    count = -(-num_residues // most)
    bounds = [num_residues * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


@torch.inference_mode()  # threads begin without it
def _means(
    encoder: Encoder,
    layers: Sequence[int],
    proteins: Sequence[NDArray[np.integer]],
    pieces: Sequence[tuple[int, int, int]],
    batch: list[int],
) -> Tensor:
    """Return the means of each piece (protein, first residue, end) of a batch, fp32 on the CPU."""
    cut = [proteins[owner][start:end] for owner, start, end in (pieces[number] for number in batch)]
    row = pack(encoder.vocabulary, cut).to(encoder.device)
    return torch.cat([row.mean(states) for states in encoder(row, layers)], dim=1).cpu()


class FeatureTable:
    """The vectors of all proteins met so far, each encoded once in the life of the table.

    Every process encodes its share of what is missing, so all must call :meth:`fill` together, with the same proteins.

    Attributes:
        index: The proteins.
        longest: Most residues read at once, see :func:`encode_proteins`.
        training: Numbers of the training split's proteins, int64, ascending.
        vectors: fp32 [num_encoded, num_features], on the encoder's device.
    """

    def __init__(self) -> None:
        self.index = ProteinIndex()
        self.longest = 0
        self.training = np.empty(0, dtype=np.int64)
        self.vectors = torch.empty(0, 0)

    def emptied(self, longest: int) -> FeatureTable:
        """Return a table of the same proteins without their vectors, which are to be made with another ``longest``."""
        table = FeatureTable()
        table.index, table.training, table.longest = self.index, self.training, longest
        return table

    def fill(self, encoder: Encoder) -> Tensor:
        """Encode what is missing, and return the vectors of all proteins."""
        missing = self.index.residues[len(self.vectors) :]
        if not missing:
            return self.vectors
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = list(range(rank, len(missing), world_size))
        total = sum(len(missing[number]) for number in own)
        with tqdm(total=total, desc="encode", unit="res", unit_scale=True, disable=None if rank == 0 else True) as bar:
            found = encode_proteins(encoder, [missing[number] for number in own], self.longest, told=bar.update)
        vectors = torch.zeros(len(missing), num_features(encoder))
        vectors[own] = found
        vectors = vectors.to(encoder.device)
        if world_size > 1:
            dist.all_reduce(vectors)
        self.vectors = torch.cat((self.vectors.to(encoder.device).view(-1, vectors.shape[1]), vectors))
        return self.vectors
