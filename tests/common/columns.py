"""Sequences as the columns that the data path works on."""

import numpy as np
from numpy.typing import NDArray


def columns(sequences: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the letters of all sequences back to back, uint8, and their bounds, int64 [num_sequences + 1]."""
    letters = np.frombuffer("".join(sequences).encode(), dtype=np.uint8)
    return letters, np.cumsum([0, *map(len, sequences)])
