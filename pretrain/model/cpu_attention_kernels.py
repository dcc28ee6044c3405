"""Attention within a segment, forward and backward, as one native loop whose scores never leave the cache.

The softmax of 16 queries over all tokens of the segment at once, of which nothing but the logarithm of its sum is kept
for the backward pass, as in FlashAttention (Dao et al. 2022; Dao 2023). All matrix products have one form, ``_tile``:
pairs of bf16 are multiplied and added in fp32, by the processor's own instruction where it has AVX-512 BF16. oneDNN's
batched products reach less than half of the rate of these, at the sizes a head of a domain has
(docs/performance.md). Native by numba, so that no compiler is needed where they run.

It is one file, since numba's cache knows only the file of a function, not those of the functions it calls: after a
change of what it takes from ``cpu_kernels.py``, this file has to be touched.

A *pair* is two bf16 in 32 bits, of places that are summed over. *Lanes* are 16 fp32 side by side, one a query.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from numpy.typing import NDArray

from megaprot.pretrain.model.cpu_kernels import (
    LEAST,
    LOG2_E,
    P0,
    P1,
    P2,
    P3,
    ROUNDING,
    Bits,
    Reals,
    gather_heads,
    scatter_heads,
    store,
)

LANES = 16
# Queries whose weights are collected before tokens get what these give them.
_COLLECTED = 32
# What numba makes code for, which its settings may keep below what the processor can; also a key of its cache.
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
_HAS_BF16 = {"+avx512bf16", "+avx512f"} <= set(_FEATURES)
# Rows of a tile: as many sums as hide the latency of one, and as there are registers.
_ROWS = 8 if _HAS_BF16 else 4

Pairs = NDArray[np.uint32]
# Cosines and sines of tokens [tokens, head_size]; without rows nothing is rotated.
Table = tuple[Reals, Reals]
NO_TABLE: Table = (np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))


class Segments(NamedTuple):
    """Where each segment of a row begins; the last element is where the last one ends.

    Attributes:
        queries: Among the queries.
        tokens: Among the tokens.
        query_rows: Among the queries if those of each segment were rounded up to 16.
        token_rows: Among the tokens, likewise.
    """

    queries: NDArray[np.int64]
    tokens: NDArray[np.int64]
    query_rows: NDArray[np.int64]
    token_rows: NDArray[np.int64]


class Strided(NamedTuple):
    """States of any strides: channel c of head h of token t is at ``t * token_step + h * head_step + c``."""

    memory: Bits
    token_step: int
    head_step: int


class Gathered(NamedTuple):
    """States of all segments one after another, each [heads, its rows, head_size], in one axis, and sums by query.

    ``log_sums`` are logarithms of the softmax's sums, one a head and query.
    """

    query: Bits
    key: Bits
    value: Bits
    log_sums: Reals


class _BFloat(ir.Type):
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_INT = ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_FLAGS = ("contract",)  # a product and a sum may be one instruction


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


_lanes = _LanesType()


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: _LanesType) -> None:
        super().__init__(manager, lanes, _FLOATS)


def _operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that numba's code can call of one that builds its instructions.

    ``Array`` among ``arguments`` stands for an array of any type: the builder gets the address of its first element.
    """

    def make(build: Callable[..., Any]) -> Any:
        def typed(typing_context: Any, *given: Any) -> Any:
            kinds = [one if wanted is types.Array else wanted for one, wanted in zip(given, arguments, strict=True)]

            def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                made = (
                    context.make_array(kind)(context, builder, value).data if wanted is types.Array else value
                    for kind, wanted, value in zip(kinds, arguments, values, strict=True)
                )
                found = build(builder, *made)
                return context.get_dummy_value() if found is None else found

            return result(*kinds), code

        names = ["typing_context", *(f"argument_{number}" for number in range(len(arguments)))]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # numba asks for it
        return intrinsic(typed)

    return make


def _at(builder: Any, memory: Any, index: Any, kind: Any, width: int = 4) -> Any:
    """Return the address of element ``index`` of ``width`` bytes, as that of a ``kind``."""
    start = builder.ptrtoint(memory, index.type)
    return builder.inttoptr(builder.add(start, builder.mul(index, index.type(width))), kind.as_pointer())


def _everywhere(builder: Any, number: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(nothing, number, _INT(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * LANES))


def _rounded(builder: Any, lanes: Any) -> Any:
    """Return bits whose upper half is the nearest bf16."""
    return builder.add(builder.bitcast(lanes, _INTS), ir.Constant(_INTS, [0x8000] * LANES))


_SIXTEEN, _UPPER = ir.Constant(_INTS, [16] * LANES), ir.Constant(_INTS, [0xFFFF0000] * LANES)


@_operation(_lanes, types.Array, types.intp)
def _get(builder: Any, memory: Any, index: Any) -> Any:
    """``_get(array, index)``: the lanes that begin at that number of the array."""
    return builder.load(_at(builder, memory, index, _FLOATS), align=4)


@_operation(types.void, types.Array, types.intp, _lanes)
def _put(builder: Any, memory: Any, index: Any, lanes: Any) -> None:
    """``_put(array, index, lanes)``: write them there."""
    builder.store(lanes, _at(builder, memory, index, _FLOATS), align=4)


@_operation(types.void, types.Array, types.intp, _lanes)
def _put_bf16(builder: Any, memory: Any, index: Any, lanes: Any) -> None:
    """``_put_bf16(array, index, lanes)``: write them as bf16, ``index`` in those."""
    halves = ir.VectorType(ir.IntType(16), LANES)
    bits = builder.trunc(builder.lshr(_rounded(builder, lanes), _SIXTEEN), halves)
    builder.store(bits, _at(builder, memory, index, halves, 2), align=2)


@_operation(types.void, types.Array, types.intp, _lanes, _lanes)
def _put_pairs(builder: Any, memory: Any, index: Any, lower: Any, upper: Any) -> None:
    """``_put_pairs(array, index, lower, upper)``: write a pair of each lane."""
    low = builder.lshr(_rounded(builder, lower), _SIXTEEN)
    bits = builder.or_(low, builder.and_(_rounded(builder, upper), _UPPER))
    builder.store(bits, _at(builder, memory, index, _INTS), align=4)


@_operation(_lanes, types.float32)
def _fill(builder: Any, number: Any) -> Any:
    """``_fill(number)``: lanes that all hold it."""
    return _everywhere(builder, number)


@_operation(_lanes, _lanes, _lanes)
def _larger(builder: Any, one: Any, other: Any) -> Any:
    """``_larger(one, other)`` of each lane; ``one`` where it is no number, so that none is hidden."""
    return builder.select(builder.fcmp_ordered("<", one, other), other, one)


@_operation(_lanes, _lanes, _lanes)
def _times_power(builder: Any, lanes: Any, shifted: Any) -> Any:
    """``_times_power(lanes, shifted)``: times 2 to the whole number in the last bits of ``shifted``."""
    power = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(lanes, _INTS), power), _FLOATS)


def _allow(operation: Any, instruction: str) -> None:
    @infer_global(operation)
    class _OfLanes(ConcreteTemplate):
        cases = (signature(_lanes, _lanes, _lanes),)

    @lower_builtin(operation, _lanes, _lanes)
    def _code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return getattr(builder, instruction)(*values, flags=_FLAGS)


_allow(operator.add, "fadd")
_allow(operator.sub, "fsub")
_allow(operator.mul, "fmul")


@_operation(
    types.void,
    *(types.Array, types.intp, types.intp, types.intp),
    *(types.Array, types.intp, types.intp),
    *(types.Array, types.intp, types.intp),
    *(types.intp, types.boolean),
)
def _tile(
    builder: Any, left: Any, first: Any, row_step: Any, step: Any, right: Any, right_first: Any, right_step: Any,
    sums: Any, sums_first: Any, sums_step: Any, depth: Any, adds: Any,
) -> None:  # fmt: skip
    """Write or add to ``_ROWS`` rows of 16 sums the products of pairs on the left and 16 pairs each on the right.

    ``_tile(left, first, row_step, step, right, right_first, right_step, sums, sums_first, sums_step, depth, adds)``:
    pair p of row r on the left is at ``first + r * row_step + p * step``, the 16 of p on the right begin at
    ``right_first + p * right_step``, the sums of r at ``sums_first + r * sums_step``, all in 32 bits; p < ``depth``.
    """
    index = depth.type
    places = [builder.add(sums_first, builder.mul(sums_step, index(row))) for row in range(_ROWS)]
    targets = [_at(builder, sums, place, _FLOATS) for place in places]
    with builder.if_else(adds) as (then, otherwise):
        with then:
            added = [builder.load(target, align=4) for target in targets]
            from_then = builder.block
        with otherwise:
            from_otherwise = builder.block
    entry, before = builder.block, [builder.phi(_FLOATS) for _ in range(_ROWS)]
    for value, old in zip(before, added, strict=True):
        value.add_incoming(old, from_then)
        value.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), from_otherwise)
    loop, end = builder.append_basic_block("pairs"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(index)
    number.add_incoming(index(0), entry)
    totals = [builder.phi(_FLOATS) for _ in range(_ROWS)]
    place = builder.add(right_first, builder.mul(number, right_step))
    many = builder.load(_at(builder, right, place, _INTS), align=4)
    start = builder.add(first, builder.mul(number, step))
    for row, total in enumerate(totals):
        one = builder.load(_at(builder, left, builder.add(start, builder.mul(row_step, index(row))), _INT), align=4)
        total.add_incoming(before[row], entry)
        total.add_incoming(_sum_of_products(builder, total, many, _everywhere(builder, one)), loop)
    following = builder.add(number, index(1))
    number.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
    builder.position_at_end(end)
    for target, total in zip(targets, totals, strict=True):
        builder.store(total.incomings[1][0], target, align=4)


def _sum_of_products(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Return total + lower left * lower right + upper left * upper right, of 16 pairs each."""

    def function(name: str, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, arguments), name)

    if _HAS_BF16:
        halves = ir.VectorType(_BFloat(), 2 * LANES)
        multiply = function("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, halves, halves)
        return builder.call(multiply, [total, builder.bitcast(left, halves), builder.bitcast(right, halves)])
    multiply = function(f"llvm.fmuladd.v{LANES}f32", _FLOATS, _FLOATS, _FLOATS)
    lower = [builder.bitcast(builder.shl(pairs, _SIXTEEN), _FLOATS) for pairs in (left, right)]
    upper = [builder.bitcast(builder.and_(pairs, _UPPER), _FLOATS) for pairs in (left, right)]
    return builder.call(multiply, [*upper, builder.call(multiply, [*lower, total])])


@numba.njit(cache=True, nogil=True, inline="always")
def _exp(lanes: Any) -> Any:
    """Return exp of lanes that are at most 80."""
    lanes = _larger(lanes, _fill(LEAST)) * _fill(LOG2_E)
    shifted = lanes + _fill(ROUNDING)
    rest = lanes - (shifted - _fill(ROUNDING))
    power = _fill(P0) + rest * (_fill(P1) + rest * (_fill(P2) + rest * _fill(P3)))
    return _times_power(power, shifted)


@numba.njit(cache=True, nogil=True)
def _lines(number: int, width: int, dtype: Any) -> Any:
    """Return memory [number, width] of 32 bits an element that begins at a line of the cache, all zero."""
    memory = np.zeros(number * width + LANES, dtype)
    start = (-memory.ctypes.data % 64) // 4
    return memory[start : start + number * width].reshape(number, width)


@numba.njit(cache=True, nogil=True)
def _pair_channels(states: Pairs, pairs: Pairs) -> None:
    """Turn 16 tokens' pairs of channels [16, pairs] into [pairs, 16]."""
    for lane in range(LANES):
        for pair in range(len(pairs)):
            pairs[pair, lane] = states[lane, pair]


@numba.njit(cache=True, nogil=True)
def _pair_tokens(states: Bits, pairs: Pairs) -> None:
    """Turn states [tokens, channels] into pairs of tokens [tokens / 2, channels or more]."""
    for pair in range(len(states) // 2):
        lower, upper, target = states[2 * pair], states[2 * pair + 1], pairs[pair]
        for channel in range(states.shape[1]):
            target[channel] = np.uint32(lower[channel]) | (np.uint32(upper[channel]) << np.uint32(16))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _scores(of_tokens: Pairs, of_queries: Pairs, scores: Reals) -> None:
    """Multiply pairs of channels of tokens [tokens, pairs] and of 16 queries [pairs, 16]: [tokens, 16]."""
    pairs = len(of_queries)
    for token in range(0, len(scores), _ROWS):
        _tile(of_tokens, token * pairs, pairs, 1, of_queries, 0, LANES, scores, token * LANES, LANES, pairs, False)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _weighted(of_tokens: Pairs, weights: Pairs, sums: Reals) -> None:
    """Sum states by weights: pairs of tokens [tokens / 2, channels] and of weights [tokens / 2, 16]: [channels, 16]."""
    channels = len(sums)
    for channel in range(0, channels, _ROWS):
        _tile(of_tokens, channel, 1, channels, weights, 0, LANES, sums, channel * LANES, LANES, len(weights), False)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _spread(weights: Pairs, of_queries: Pairs, num_pairs: int, sums: Reals) -> None:
    """Add to tokens what their weights [tokens, pairs] give them of pairs of queries [pairs, channels]."""
    pairs, channels = of_queries.shape
    for channel in range(0, channels, LANES):
        for token in range(0, len(sums), _ROWS):
            place = token * channels + channel
            here = token * pairs
            _tile(weights, here, pairs, 1, of_queries, channel, channels, sums, place, channels, num_pairs, True)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend(query: Bits, key: Bits, value: Bits, num_queries: int, length: int, output: Bits, log_sums: Reals) -> None:
    """Write softmax(Q K^T) V of a segment, head by head.

    Args:
        query: Scaled queries [heads, queries rounded up to 16, head_size], zeros after the last; head_size is even.
        key: [heads, tokens rounded up to 16, head_size], likewise.
        value: Likewise.
        num_queries: Queries.
        length: Tokens.
        output: Result, of the shape of ``query``; what is beyond the queries is not written.
        log_sums: Result [heads, queries rounded up]: logarithm of the softmax's sum.
    """
    num_heads, _, head_size = query.shape
    padded, channels = key.shape[1], -(-head_size // _ROWS) * _ROWS
    asked, scores = _lines(head_size // 2, LANES, np.uint32), _lines(padded, LANES, np.float32)
    weights, values = _lines(padded // 2, LANES, np.uint32), _lines(padded // 2, channels, np.uint32)
    sums, totals = _lines(channels, LANES, np.float32), np.empty(LANES, np.float32)
    for head in range(num_heads):
        queries, keys = query[head].view(np.uint32), key[head].view(np.uint32)
        _pair_tokens(value[head], values)
        for first in range(0, num_queries, LANES):
            _pair_channels(queries[first : first + LANES], asked)
            _scores(keys, asked, scores)
            largest = _get(scores, 0)
            for token in range(1, length):
                largest = _larger(largest, _get(scores, token * LANES))
            total = _fill(np.float32(0))
            for pair in range(length // 2):
                lower = _exp(_get(scores, 2 * pair * LANES) - largest)
                upper = _exp(_get(scores, (2 * pair + 1) * LANES) - largest)
                total = total + (lower + upper)
                _put_pairs(weights, pair * LANES, lower, upper)
            if length % 2:
                lower = _exp(_get(scores, (length - 1) * LANES) - largest)
                total = total + lower
                _put_pairs(weights, length // 2 * LANES, lower, _fill(np.float32(0)))
            _weighted(values, weights, sums)
            _put(totals, 0, total)
            _put(log_sums[head], first, largest)
            for lane in range(min(LANES, num_queries - first)):
                inverse = np.float32(1) / totals[lane]
                for channel in range(head_size):
                    output[head, first + lane, channel] = store(sums[channel, lane] * inverse)
            for lane in range(LANES):
                log_sums[head, first + lane] += np.float32(math.log(totals[lane]))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend_backward(
    query: Bits, key: Bits, value: Bits, of_output: Bits, log_sums: Reals, num_queries: int, length: int,
    of_query: Bits, of_key: Bits, of_value: Bits,
) -> None:  # fmt: skip
    """Write the gradients of ``attend``'s query, key and value.

    Args:
        query: As ``attend`` took it; ``key``, ``value``, ``num_queries`` and ``length`` likewise.
        of_output: Gradient of its result, of that shape, zeros after the last query.
        log_sums: What it has written.
        of_query: Result, of the shape of ``query``; what is beyond the queries is not written.
        of_key: Result, of the shape of ``key``.
        of_value: Result, likewise.
    """
    num_heads, _, head_size = query.shape
    padded, channels, wide = key.shape[1], -(-head_size // _ROWS) * _ROWS, -(-head_size // LANES) * LANES
    asked, given = _lines(head_size // 2, LANES, np.uint32), _lines(head_size // 2, LANES, np.uint32)
    asked_rows, given_rows = _lines(_COLLECTED // 2, wide, np.uint32), _lines(_COLLECTED // 2, wide, np.uint32)
    scores, slopes = _lines(padded, LANES, np.float32), _lines(padded, LANES, np.float32)
    weights = _lines(padded, _COLLECTED // 2, np.uint32)
    differences = _lines(padded, _COLLECTED // 2, np.uint32)
    differences_by_pairs = _lines(padded // 2, LANES, np.uint32)
    keys_by_pairs = _lines(padded // 2, channels, np.uint32)
    sums = _lines(channels, LANES, np.float32)
    key_sums, value_sums = _lines(padded, wide, np.float32), _lines(padded, wide, np.float32)
    for head in range(num_heads):
        queries, outputs = query[head].view(np.uint32), of_output[head].view(np.uint32)
        keys, values = key[head].view(np.uint32), value[head].view(np.uint32)
        _pair_tokens(key[head], keys_by_pairs)
        key_sums[:] = 0
        value_sums[:] = 0
        for first in range(0, num_queries, LANES):
            last, column = first + LANES, first % _COLLECTED
            here = slice(column // 2, (column + LANES) // 2)
            _pair_channels(queries[first:last], asked)
            _pair_channels(outputs[first:last], given)
            _pair_tokens(query[head, first:last], asked_rows[here])
            _pair_tokens(of_output[head, first:last], given_rows[here])
            _scores(keys, asked, scores)
            _scores(values, given, slopes)
            log_sum, mean = _get(log_sums[head], first), _fill(np.float32(0))
            for token in range(length):
                weight = _exp(_get(scores, token * LANES) - log_sum)
                mean = mean + weight * _get(slopes, token * LANES)
                _put(scores, token * LANES, weight)
                _put_bf16(weights, token * _COLLECTED + column, weight)
            # A token beyond the last has a score of 0 still, which is the weight it should have.
            for token in range(0, length, 2):
                place, following = token * LANES, (token + 1) * LANES
                lower = _get(scores, place) * (_get(slopes, place) - mean)
                upper = _get(scores, following) * (_get(slopes, following) - mean)
                _put_bf16(differences, token * _COLLECTED + column, lower)
                _put_bf16(differences, (token + 1) * _COLLECTED + column, upper)
                _put_pairs(differences_by_pairs, token // 2 * LANES, lower, upper)
            if column + LANES == _COLLECTED or last >= num_queries:
                _spread(weights, given_rows, here.stop, value_sums)
                _spread(differences, asked_rows, here.stop, key_sums)
            _weighted(keys_by_pairs, differences_by_pairs, sums)
            for lane in range(min(LANES, num_queries - first)):
                for channel in range(head_size):
                    of_query[head, first + lane, channel] = store(sums[channel, lane])
        for token in range(padded):
            for channel in range(head_size):
                of_key[head, token, channel] = store(key_sums[token, channel])
                of_value[head, token, channel] = store(value_sums[token, channel])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _part(states: Any, rows: NDArray[np.int64], number: int, shape: tuple[int, int]) -> Any:
    """Return a segment's part [heads, rows, head_size] of what ``Gathered`` holds; ``shape``: heads, head_size."""
    num_heads, head_size = shape
    first, last = rows[number], rows[number + 1]
    width = num_heads * head_size
    return states[first * width : last * width].reshape(num_heads, last - first, head_size)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _sums(sums: Reals, rows: NDArray[np.int64], number: int, num_heads: int) -> Any:
    first, last = rows[number], rows[number + 1]
    return sums[first * num_heads : last * num_heads].reshape(num_heads, last - first)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _gather(states: Strided, table: Table, scale: np.float32, places: NDArray[np.int64], number: int, to: Bits) -> None:
    """Put a segment's heads together in ``to`` [heads, rows, head_size], rotated."""
    first, last = places[number], places[number + 1]
    cos, sin = table[0][first:last], table[1][first:last]
    start = first * states.token_step
    gather_heads(states.memory, start, states.token_step, states.head_step, cos, sin, scale, last - first, to)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend_segments(
    numbers: NDArray[np.int64], segments: Segments, states: tuple[Strided, Strided, Strided], query_table: Table,
    table: Table, scale: np.float32, gathered: Gathered, output: Bits,
) -> None:  # fmt: skip
    """Attend within some segments of a row.

    Args:
        numbers: Of which segments.
        segments: Their bounds.
        states: Query, key and value.
        query_table: Rotation of the queries.
        table: Rotation of the tokens.
        scale: Factor on the scores.
        gathered: Result, for the backward pass: rotated states and sums of these segments.
        output: Result [queries, heads, head_size].
    """
    shape, one = output.shape[1:], np.float32(1)
    for number in numbers:
        query = _part(gathered.query, segments.query_rows, number, shape)
        key = _part(gathered.key, segments.token_rows, number, shape)
        value = _part(gathered.value, segments.token_rows, number, shape)
        log_sums = _sums(gathered.log_sums, segments.query_rows, number, shape[0])
        _gather(states[0], query_table, scale, segments.queries, number, query)
        _gather(states[1], table, one, segments.tokens, number, key)
        _gather(states[2], NO_TABLE, one, segments.tokens, number, value)
        first, last = segments.queries[number], segments.queries[number + 1]
        length = segments.tokens[number + 1] - segments.tokens[number]
        attended = np.empty_like(query)
        attend(query, key, value, last - first, length, attended, log_sums)
        scatter_heads(attended, *NO_TABLE, one, output[first:last])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def attend_segments_backward(
    numbers: NDArray[np.int64], segments: Segments, of_output: Strided, query_table: Table, table: Table,
    scale: np.float32, gathered: Gathered, of_query: Bits, of_key: Bits, of_value: Bits,
) -> None:  # fmt: skip
    """Write the gradients of ``attend_segments``'s states.

    Args:
        numbers: As ``attend_segments`` took them; ``segments``, both tables and ``scale`` likewise.
        of_output: Gradient of its result.
        gathered: What it has kept.
        of_query: Result [queries, heads, head_size].
        of_key: Result [tokens, heads, head_size].
        of_value: Result, likewise.
    """
    shape, one = of_query.shape[1:], np.float32(1)
    for number in numbers:
        query = _part(gathered.query, segments.query_rows, number, shape)
        key = _part(gathered.key, segments.token_rows, number, shape)
        value = _part(gathered.value, segments.token_rows, number, shape)
        log_sums = _sums(gathered.log_sums, segments.query_rows, number, shape[0])
        given = np.empty_like(query)
        _gather(of_output, NO_TABLE, one, segments.queries, number, given)
        made_query, made_key, made_value = np.empty_like(query), np.empty_like(key), np.empty_like(value)
        first, last = segments.queries[number], segments.queries[number + 1]
        begin, end = segments.tokens[number], segments.tokens[number + 1]
        attend_backward(query, key, value, given, log_sums, last - first, end - begin, made_query, made_key, made_value)
        scatter_heads(made_query, query_table[0][first:last], query_table[1][first:last], scale, of_query[first:last])
        scatter_heads(made_key, table[0][begin:end], table[1][begin:end], one, of_key[begin:end])
        scatter_heads(made_value, *NO_TABLE, one, of_value[begin:end])
