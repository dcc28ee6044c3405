"""Elementwise passes of a layer in bf16 on the CPU, each a single loop over memory.

torch's own CPU operators for these run one after another at 0.6 to 1.6 ns an element; the loops here compute in fp32
between one read and one write of bf16, at 0.2 to 0.5 (docs/performance.md). Native by numba, so that no compiler is
needed where they run. Arrays of type uint16 hold the bits of bf16. Exponentials are good to 1e-4, finer than bf16.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Reals = NDArray[np.float32]

# Sums may be taken in any order, which vector registers need; values are finite or the step is skipped anyway. For the
# same reason division is numpy's, without a test for zero.
_FAST = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}
LOG2_E = np.float32(1 / math.log(2))
ROUNDING = np.float32(1.5 * 2**23)  # added to a small number, leaves its nearest whole number in the last bits
LEAST = np.float32(-87.0)  # exp of less is below the smallest normal number
# 2^f for f in [-1/2, 1/2], least relative error.
P0, P1, P2, P3 = (np.float32(value) for value in (0.99992807, 0.69326099, 0.24261112, 0.05517166))
# Phi(-x) = (A1 t + ... + A5 t^5) exp(-x^2 / 2), t = 1 / (1 + R x): Abramowitz & Stegun 7.1.26, good to 1e-7.
_R = np.float32(0.3275911 / math.sqrt(2))
_A1, _A2, _A3 = (np.float32(value / 2) for value in (0.254829592, -0.284496736, 1.421413741))
_A4, _A5 = (np.float32(value / 2) for value in (-1.453152027, 1.061405429))
_DENSITY = np.float32(1 / math.sqrt(2 * math.pi))
_TANH_SCALE, _TANH_CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)  # Hendrycks & Gimpel 2016
# Plain numbers would make float64 of float32.
_ONE, _HALF, _THREE, _TANH_LEAST = (np.float32(value) for value in (1, 0.5, 3, -80))


def _bits_of_float(typing_context: Any, value: Any) -> Any:
    """Type and code of ``_bits(float32) -> uint32``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), build


def _float_of_bits(typing_context: Any, value: Any) -> Any:
    """Type and code of ``_float(uint32) -> float32``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), build


_bits: Any = intrinsic(_bits_of_float)
_float: Any = intrinsic(_float_of_bits)


@numba.njit(cache=True, nogil=True)
def load(value: np.uint16) -> np.float32:
    """Return the number whose bf16 bits these are."""
    return _float(np.uint32(value) << np.uint32(16))


@numba.njit(cache=True, nogil=True)
def store(value: np.float32) -> np.uint16:
    """Return the bits of the nearest bf16, of halves the one away from zero."""
    return np.uint16((_bits(value) + np.uint32(0x8000)) >> np.uint32(16))


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _exp(value: np.float32) -> np.float32:
    """Return exp(value) of a value of at most 80; no reordering here, which would take ``ROUNDING`` out again."""
    value = value if value > LEAST else LEAST
    shifted = value * LOG2_E + ROUNDING
    rest = value * LOG2_E - (shifted - ROUNDING)
    power = P0 + rest * (P1 + rest * (P2 + rest * P3))
    return _float(_bits(power) + (_bits(shifted) << np.uint32(23)))


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def gather_heads(
    states: Bits, first: int, token_step: int, head_step: int, cos: Reals, sin: Reals, scale: np.float32, length: int,
    gathered: Bits,
) -> None:  # fmt: skip
    """Rotate a segment's states by their positions and put each head's together, zeros after the last token.

    Args:
        states: All memory of the states, one axis; channel c of head h of token t of the segment is at
            ``first + t * token_step + h * head_step + c``.
        cos: Cosines of the segment's tokens [length, head_size]; without rows nothing is rotated.
        sin: Sines, likewise.
        scale: Factor on all states.
        length: Tokens of the segment.
        gathered: Result [heads, length or more, head_size].
    """
    num_heads, _, head_size = gathered.shape
    half = head_size // 2
    for head in range(num_heads):
        for token in range(length):
            start = first + token * token_step + head * head_step
            low, high = states[start : start + half], states[start + half : start + head_size]
            target = gathered[head, token]
            if len(cos):
                cosines, sines = cos[token], sin[token]
                for channel in range(half):
                    one, other = load(low[channel]) * scale, load(high[channel]) * scale
                    target[channel] = store(one * cosines[channel] - other * sines[channel])
                    target[channel + half] = store(other * cosines[channel] + one * sines[channel])
            else:
                for channel in range(half):
                    target[channel] = store(load(low[channel]) * scale)
                    target[channel + half] = store(load(high[channel]) * scale)
        gathered[head, length:] = 0


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def scatter_heads(gathered: Bits, cos: Reals, sin: Reals, scale: np.float32, states: Bits) -> None:
    """Rotate each head's states of a segment back and put each token's together: ``gather_heads`` undone.

    Args:
        gathered: States [heads, length or more, head_size].
        cos: Cosines of the segment's tokens [length, head_size]; without rows nothing is rotated.
        sin: Sines, likewise.
        scale: Factor on all states.
        states: Result [length, heads, head_size].
    """
    length, num_heads, head_size = states.shape
    half = head_size // 2
    for head in range(num_heads):
        for token in range(length):
            source, target = gathered[head, token], states[token, head]
            if len(cos):
                cosines, sines = cos[token], sin[token]
                for channel in range(half):
                    one, other = load(source[channel]) * scale, load(source[channel + half]) * scale
                    target[channel] = store(one * cosines[channel] + other * sines[channel])
                    target[channel + half] = store(other * cosines[channel] - one * sines[channel])
            else:
                for channel in range(head_size):
                    target[channel] = store(load(source[channel]) * scale)


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy", inline="always")
def _gate(value: np.float32, is_tanh: bool) -> tuple[np.float32, np.float32]:
    """Return g and g' of GELU(x) = x g(x): the normal distribution, or Hendrycks and Gimpel's tanh in its place."""
    if is_tanh:
        inner = _TANH_SCALE * value * (_ONE + _TANH_CUBE * value * value)
        inner = inner if inner > _TANH_LEAST else _TANH_LEAST
        gate = _ONE / (_ONE + _exp(-inner))
        return gate, gate * (_ONE - gate) * _TANH_SCALE * (_ONE + _THREE * _TANH_CUBE * value * value)
    exponential = _exp(-_HALF * value * value)
    part = _ONE / (_ONE + _R * abs(value))
    tail = part * (_A1 + part * (_A2 + part * (_A3 + part * (_A4 + part * _A5)))) * exponential
    return (_ONE - tail if value > 0 else tail), _DENSITY * exponential


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def bias_gelu(states: Bits, bias: Bits, is_tanh: bool, output: Bits) -> None:
    """Write GELU(states + bias); ``states`` and ``output`` [tokens, channels], ``bias`` [channels]."""
    for token in range(states.shape[0]):
        row, target = states[token], output[token]
        for channel in range(len(row)):
            value = load(row[channel]) + load(bias[channel])
            target[channel] = store(value * _gate(value, is_tanh)[0])


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def bias_gelu_backward(
    states: Bits, bias: Bits, is_tanh: bool, of_output: Bits, of_states: Bits, of_bias: Reals
) -> None:
    """Write the gradient of ``bias_gelu``'s states, and add that of its bias to ``of_bias`` [channels]."""
    for token in range(states.shape[0]):
        row, gradient, target = states[token], of_output[token], of_states[token]
        for channel in range(len(row)):
            value = load(row[channel]) + load(bias[channel])
            gate, slope = _gate(value, is_tanh)
            result = load(gradient[channel]) * (gate + value * slope)
            of_bias[channel] += result
            target[channel] = store(result)
