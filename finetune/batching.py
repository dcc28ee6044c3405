"""Which sequences share a batch, and how a protein is cut for a model whose positions end."""

from __future__ import annotations

from collections.abc import Sequence

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Tokens of a batch unless told: on a CPU as many as stay in its caches, on a GPU enough to fill it."""
OVERLAP = 4
"""Neighbouring windows share a quarter of a window: one part in this many."""


def plan_batches(lengths: Sequence[int], max_tokens: int, is_padding_free: bool) -> list[list[int]]:
    """Return batches of sequence numbers, longest sequences first, each of at most ``max_tokens`` tokens.

    Sorting puts equal lengths side by side, which padding-free attention takes in one call and padded batches need. A
    sequence that is longer than the budget is a batch of its own.

    Args:
        lengths: Tokens of each sequence, boundary tokens included.
        max_tokens: Budget of a batch; padding counts where the model runs padded.
        is_padding_free: Whether it does not.
    """
    batches: list[list[int]] = []
    used = 0
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        length = lengths[number]
        if batches and is_padding_free:
            fits = used + length <= max_tokens
        else:  # the first of a batch is its longest
            fits = bool(batches) and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens
        if fits:
            batches[-1].append(number)
            used += length
        else:
            batches.append([number])
            used = length
    return batches


def windows(num_residues: int, longest: int) -> list[tuple[int, int]]:
    """Return the windows [start, end) that cover a protein: one where it fits, else overlapping ones.

    Windows are of ``longest`` residues and share a quarter with the next; the last one is moved back to end with the
    protein. ``longest`` 0 means any length.
    """
    if not longest or num_residues <= longest:
        return [(0, num_residues)]
    step = max(1, longest - longest // OVERLAP)
    starts = [*range(0, num_residues - longest, step), num_residues - longest]
    return [(start, start + longest) for start in starts]


def centred_window(position: int, num_residues: int, longest: int) -> tuple[int, int]:
    """Return the window [start, end) of at most ``longest`` residues (0: any number) with ``position`` in its middle.

    At the protein's ends the window is moved inside it.
    """
    if not longest or num_residues <= longest:
        return 0, num_residues
    start = min(max(0, position - longest // 2), num_residues - longest)
    return start, start + longest
