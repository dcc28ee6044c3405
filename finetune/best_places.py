"""The largest of many values, in a fixed order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_places(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Return the places of the ``count`` largest values, the largest first, of equals the first one first.

    Only what may be among them is sorted: everything from the last of them on, its ties too.
    """
    if count < len(values):
        places = np.flatnonzero(values >= np.partition(values, -count)[-count])
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]
