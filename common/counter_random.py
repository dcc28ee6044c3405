"""Random numbers as a pure function of (key, counter): SplitMix64 used as a hash.

Every draw of the data stream (order of an epoch, place of a crop, mask of a residue) is one of these, so that it
depends on nothing but its key: not on the process that makes it, on what was drawn before, or on the version of a
library. The generator is that of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014),
with Stafford's variant 13 of the finaliser: output n of the stream with seed s is ``mix64(s + (n + 1) *
GOLDEN_GAMMA)``.
"""

from functools import lru_cache

import numba
import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's finaliser of every element of an array: a bijection of 64-bit words that looks random."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= _FIRST_FACTOR
    mixed ^= mixed >> np.uint64(27)
    mixed *= _SECOND_FACTOR
    mixed ^= mixed >> np.uint64(31)
    return mixed


@numba.njit(cache=True, nogil=True)
def scalar_mix64(value: np.uint64) -> np.uint64:
    """Return ``mix64`` of one word, for native loops."""
    value = (value ^ (value >> np.uint64(30))) * _FIRST_FACTOR
    value = (value ^ (value >> np.uint64(27))) * _SECOND_FACTOR
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def scalar_bits(key: np.uint64, counter: int) -> np.uint64:
    """Return ``uniform_bits`` of one (key, counter), for native loops."""
    return scalar_mix64((np.uint64(counter) + np.uint64(1)) * GOLDEN_GAMMA + key)


@numba.njit(cache=True, nogil=True)
def keys(prefix: np.uint64, numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return one key for each number [n], of the family ``prefix``: ``keys(key(a, b), [c])[0] == key(a, b, c)``."""
    found = np.empty(len(numbers), dtype=np.uint64)
    for place in range(len(numbers)):
        found[place] = scalar_mix64((np.uint64(numbers[place]) ^ prefix) + GOLDEN_GAMMA)
    return found


@lru_cache(maxsize=1024)  # the same few keys are asked for row after row
def key(*parts: int) -> np.uint64:
    """Fold integers (seed, epoch, sequence, ...), each taken modulo 2**64, into one key; their order counts."""
    state = np.uint64(0)
    for part in parts:
        state = keys(state, np.array([part % 2**64], dtype=np.uint64))[0]
    return state


def uniform_bits(keys: NDArray[np.uint64] | np.uint64, counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return 64 uniform bits for each (key, counter) [n]: output ``counter`` of the SplitMix64 stream ``key``."""
    return mix64((counters.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA + keys)


def below(bits: NDArray[np.uint64], bounds: NDArray[np.integer] | int) -> NDArray[np.int64]:
    """Turn the upper half of 64 random bits into integers from 0 to bounds - 1 (bounds below 2**31; bias 2**-32)."""
    return (((bits >> np.uint64(32)) * np.asarray(bounds).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
