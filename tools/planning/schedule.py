"""Pipeline schedules in miniature: which micro-batches are in flight at once on a rank.

1F1B (Narayanan et al. 2019) and its interleaved form (Narayanan et al. 2021), in the order megatron-core runs them.
"""

from __future__ import annotations

from collections.abc import Sequence


def num_warm_up_passes(rank: int, pipeline: int, num_chunks: int, num_micro_batches: int) -> int:
    """Return the forward passes of chunks that ``rank`` runs before its first backward pass begins to alternate."""
    if num_chunks == 1:
        wanted = pipeline - rank - 1
    else:
        wanted = 2 * (pipeline - rank - 1) + (num_chunks - 1) * pipeline
    return min(wanted, num_micro_batches * num_chunks)


def peak_in_flight(rank: int, pipeline: int, num_micro_batches: int, bytes_by_chunk: Sequence[float]) -> float:
    """Return the most bytes that forward passes waiting for their backward pass hold at once on a rank.

    Args:
        rank: Pipeline rank.
        pipeline: Pipeline stages.
        num_micro_batches: Micro-batches of a step.
        bytes_by_chunk: What one forward pass of each of the rank's chunks keeps.
    """
    num_chunks = len(bytes_by_chunk)
    total = num_micro_batches * num_chunks
    warm_up = num_warm_up_passes(rank, pipeline, num_chunks, num_micro_batches)
    # The schedule repeats every pipeline x num_chunks passes; the peak is within the first rounds.
    considered = min(total, warm_up + 2 * pipeline * num_chunks)
    held = peak = 0.0
    for number in range(considered):
        held += bytes_by_chunk[number // pipeline % num_chunks]
        peak = max(peak, held)
        if number >= warm_up:
            held -= bytes_by_chunk[num_chunks - 1 - (number - warm_up) // pipeline % num_chunks]
    return peak
