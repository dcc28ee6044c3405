"""What is read of a pair that is longer than the encoder, or the run's ``max_length``, allows."""

from __future__ import annotations

from megaprot.finetune.batch import num_pair_boundaries
from megaprot.finetune.batching import windows
from megaprot.finetune.encoder import Encoder

Span = tuple[int, int]
"""First residue, and the one behind the last."""


def residue_budget(encoder: Encoder, max_length: int) -> int:
    """Return how many residues of both proteins together are read at once; 0 for any number.

    Args:
        encoder: Its positions may end.
        max_length: Most tokens of a pair, boundary tokens included; 0 for as many as the encoder takes.
    """
    limits = [max_length] if max_length else []
    if encoder.longest:
        limits.append(encoder.longest + encoder.vocabulary.num_boundary_tokens)
    return max(2, min(limits) - num_pair_boundaries(encoder.vocabulary)) if limits else 0


def longest_first(num_first: int, num_second: int, budget: int) -> tuple[int, int]:
    """Return how many residues stay of each of two proteins when the longer one is cut first.

    As transformers' ``longest_first``: residue by residue the longer protein loses its last one, of equals the second.

    Args:
        num_first: Residues of the first.
        num_second: Residues of the second.
        budget: Most residues of both together; 0 for any number.
    """
    if not budget or num_first + num_second <= budget:
        return num_first, num_second
    half = budget // 2
    if num_first <= budget - half and num_first <= num_second:
        return num_first, budget - num_first
    if num_second <= half:
        return budget - num_second, num_second
    return budget - half, half


def window_pairs(num_first: int, num_second: int, budget: int) -> list[tuple[Span, Span]]:
    """Return the pairs of windows that show every residue of one protein beside every one of the other.

    Windows are as long as what :func:`longest_first` leaves, and neighbours share a quarter.
    """
    longest = longest_first(num_first, num_second, budget)
    return [(one, other) for one in windows(num_first, longest[0]) for other in windows(num_second, longest[1])]
