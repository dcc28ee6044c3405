"""A masked-language model's log probabilities at chosen positions of a protein, masked or as it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.finetune.batch import pack
from megaprot.finetune.batch_workers import batch_workers
from megaprot.finetune.batching import BATCH_TOKENS, centred_window, plan_batches
from megaprot.finetune.encoder import Encoder


class _Copy(NamedTuple):
    """A window [start, end) of the protein and the positions that are asked for in it."""

    start: int
    end: int
    positions: list[int]


def log_probabilities(
    encoder: Encoder,
    residues: NDArray[np.unsignedinteger],
    positions: Sequence[int],
    masked: bool,
    max_tokens: int,
    progress: Callable[[int], object],
) -> Tensor:
    """Return the log probabilities of all tokens at each position [num_positions, vocabulary], fp32, on the CPU.

    Masked, each position is read from a copy of the protein of its own in which it alone is masked; else all from the
    protein as it stands. A protein longer than the model's positions is read in a window centred on each position.

    Args:
        encoder: The model with its head, in evaluation mode.
        residues: Ids [num_residues] without boundary tokens.
        positions: Places in the protein, from 0, each once.
        masked: Mask the position that is read.
        max_tokens: Budget of a batch; 0 takes that of the device.
        progress: Told the number of positions of each batch that is done.
    """
    by_window: dict[tuple[int, int, int], _Copy] = {}
    for position in positions:
        window = centred_window(position, len(residues), encoder.longest)
        copy = by_window.setdefault((*window, position if masked else -1), _Copy(*window, []))
        copy.positions.append(position)
    copies = list(by_window.values())
    lengths = [copy.end - copy.start + encoder.vocabulary.num_boundary_tokens for copy in copies]
    batches = plan_batches(lengths, max_tokens or BATCH_TOKENS[encoder.device.type], encoder.is_padding_free)
    rows = {position: row for row, position in enumerate(positions)}
    found: Tensor | None = None
    with batch_workers(encoder.device) as run_all:
        one_batch = partial(_read_batch, encoder, residues, copies, masked)
        for batch, result in zip(batches, run_all(one_batch, batches), strict=True):
            asked = [position for number in batch for position in copies[number].positions]
            if found is None:
                found = result.new_empty(len(positions), result.shape[1])
            found[[rows[position] for position in asked]] = result
            progress(len(asked))
    assert found is not None, "no position was asked for"
    return found


@torch.inference_mode()
def _read_batch(
    encoder: Encoder, residues: NDArray[np.unsignedinteger], copies: list[_Copy], masked: bool, batch: list[int]
) -> Tensor:
    """Return the log probabilities at the positions of the copies of a batch, in their order, fp32, on the CPU."""
    sequences, places, start = [], [], 0
    for number in batch:
        copy = copies[number]
        sequences.append(residues[copy.start : copy.end])
        places += [start + 1 + position - copy.start for position in copy.positions]  # one token stands before them
        start += copy.end - copy.start + encoder.vocabulary.num_boundary_tokens
    packed = pack(encoder.vocabulary, sequences)
    if masked:
        packed.tokens[places] = encoder.vocabulary.mask
    hidden = encoder(packed.to(encoder.device))[0]
    logits = encoder.logits(hidden[torch.tensor(places, device=hidden.device)])
    return logits.float().log_softmax(dim=-1).cpu()
