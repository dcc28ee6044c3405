"""From proteins to their vectors: windows, batches by a budget of tokens, means over residues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megaprot.common.errors import RunError
from megaprot.finetune.batch import pack
from megaprot.finetune.batch_workers import batch_workers
from megaprot.finetune.batching import BATCH_TOKENS, plan_batches, windows
from megaprot.finetune.encoder import Encoder
from megaprot.tools.embedding.proteins import Protein

_GROUP_RESIDUES = 1 << 22  # residues sorted by length at a time, which bounds memory


@dataclass(frozen=True)
class VectorSettings:
    """What is made of a protein.

    Attributes:
        layers: Which hidden states, as :meth:`Encoder.forward` counts them.
        per_residue: A vector a residue instead of their mean.
        dtype: Type of the result.
        max_tokens: Budget of a batch; 0 takes that of the device.
    """

    layers: Sequence[int]
    per_residue: bool
    dtype: torch.dtype
    max_tokens: int = 0


@dataclass(frozen=True)
class _Piece:
    """A window [start, end) of the protein ``owner`` of a group."""

    owner: int
    start: int
    end: int


def embed(
    encoder: Encoder, proteins: Iterable[Protein], settings: VectorSettings, progress: Callable[[int], object]
) -> Iterator[tuple[Protein, Tensor]]:
    """Yield each protein with its vectors, on the CPU, in an order of its own.

    A vector is the mean over the protein's residues, without boundary tokens: [hidden_size], or with ``per_residue``
    [num_residues, hidden_size]; several layers come first: [num_layers, ...]. A protein longer than the model's
    positions is read in windows that share a quarter; a residue's vector is the mean over the windows that hold it.

    Args:
        encoder: The model, in evaluation mode.
        proteins: Read in groups of about four million residues, each sorted by length.
        settings: What is made of them.
        progress: Told the number of residues of each batch that is done.

    Raises:
        RunError: A vector is not finite, or not in half precision.
    """
    with batch_workers(encoder.device) as run_all:
        for group in _groups(proteins):
            pieces = [
                _Piece(owner, *window)
                for owner, protein in enumerate(group)
                for window in windows(len(protein.residues), encoder.longest)
            ]
            lengths = [piece.end - piece.start + encoder.vocabulary.num_boundary_tokens for piece in pieces]
            max_tokens = settings.max_tokens or BATCH_TOKENS[encoder.device.type]
            batches = plan_batches(lengths, max_tokens, encoder.is_padding_free)
            waiting: dict[int, dict[int, Tensor]] = {}
            num_pieces = [0] * len(group)
            for piece in pieces:
                num_pieces[piece.owner] += 1
            one_batch = partial(_embed_batch, encoder, group, pieces, num_pieces, settings)
            for batch, results in zip(batches, run_all(one_batch, batches), strict=True):
                for number, vectors in zip(batch, results, strict=True):
                    owner = pieces[number].owner
                    parts = waiting.setdefault(owner, {})
                    parts[pieces[number].start] = vectors
                    if len(parts) == num_pieces[owner]:
                        yield group[owner], _finished(group[owner], waiting.pop(owner), settings)
                progress(sum(pieces[number].end - pieces[number].start for number in batch))


def _groups(proteins: Iterable[Protein]) -> Iterator[list[Protein]]:
    group: list[Protein] = []
    num_residues = 0
    for protein in proteins:
        group.append(protein)
        num_residues += len(protein.residues)
        if num_residues >= _GROUP_RESIDUES:
            yield group
            group, num_residues = [], 0
    if group:
        yield group


@torch.inference_mode()
def _embed_batch(
    encoder: Encoder,
    group: list[Protein],
    pieces: list[_Piece],
    num_pieces: list[int],
    settings: VectorSettings,
    batch: list[int],
) -> list[Tensor]:
    """Return the vectors of each piece of a batch [num_layers, ...], a window's by residue, on the CPU, fp32."""
    chosen = [pieces[number] for number in batch]
    ids = [group[piece.owner].residues[piece.start : piece.end] for piece in chosen]
    row = pack(encoder.vocabulary, ids)
    packed = row.to(encoder.device)
    states = torch.stack(encoder(packed, settings.layers), dim=1)  # [row_tokens, num_layers, hidden_size]
    by_residue = [settings.per_residue or num_pieces[piece.owner] > 1 for piece in chosen]
    if not any(by_residue):
        return list(packed.mean(states.flatten(1)).unflatten(1, states.shape[1:]).cpu())
    found = row.residues(states.float().cpu())
    return [
        vectors.transpose(0, 1) if keep else vectors.mean(dim=0)
        for vectors, keep in zip(found, by_residue, strict=True)
    ]


def _finished(protein: Protein, parts: dict[int, Tensor], settings: VectorSettings) -> Tensor:
    """Return a protein's vectors from those of its windows {start: [num_layers, num_residues, hidden_size]}."""
    if len(parts) == 1:
        vectors = next(iter(parts.values()))
    else:
        first = parts[0]
        total = first.new_zeros(first.shape[0], len(protein.residues), first.shape[2])
        num_covering = first.new_zeros(len(protein.residues), 1)
        for start, part in parts.items():
            total[:, start : start + part.shape[1]] += part
            num_covering[start : start + part.shape[1]] += 1
        vectors = total / num_covering
        if not settings.per_residue:
            vectors = vectors.mean(dim=1)
    result = (vectors if len(settings.layers) > 1 else vectors[0]).to(settings.dtype)
    if not bool(torch.isfinite(result).all()):
        if bool(torch.isfinite(vectors).all()):
            raise RunError(f"a value of {protein.identifier} does not fit half precision; give --dtype fp32.")
        raise RunError(f"the model gives values that are not finite for {protein.identifier}; check its weights.")
    return result
