"""The generator against SplitMix64's published outputs and an implementation in Python's own integers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.counter_random import below, key, keys, mix64, scalar_bits, scalar_mix64, uniform_bits

WORD = 2**64
words = st.integers(0, WORD - 1)


def python_mix64(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def python_splitmix64(seed: int, num_outputs: int) -> list[int]:
    """The generator as its authors write it: a state that moves by the golden gamma."""
    outputs = []
    for _ in range(num_outputs):
        seed = (seed + 0x9E3779B97F4A7C15) % WORD
        outputs.append(python_mix64(seed))
    return outputs


def test_streams_are_the_published_ones() -> None:
    published = {
        1234567: [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ],
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    }
    for seed, outputs in published.items():
        assert uniform_bits(np.uint64(seed), np.arange(len(outputs))).tolist() == outputs


@given(seed=words, num_outputs=st.integers(1, 50))
def test_any_output_can_be_had_by_its_number(seed: int, num_outputs: int) -> None:
    expected = python_splitmix64(seed, num_outputs)
    assert uniform_bits(np.uint64(seed), np.arange(num_outputs)).tolist() == expected
    backwards = np.arange(num_outputs)[::-1]
    assert uniform_bits(np.full(num_outputs, seed, dtype=np.uint64), backwards).tolist() == expected[::-1]


@given(st.lists(words, min_size=1, max_size=20))
def test_mix64_agrees_with_python_integers_and_leaves_its_argument(values: list[int]) -> None:
    array = np.array(values, dtype=np.uint64)
    assert mix64(array).tolist() == [python_mix64(value) for value in values]
    assert array.tolist() == values


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5))
def test_a_key_folds_its_parts_one_by_one(parts: list[int]) -> None:
    state = 0
    for part in parts:
        state = python_mix64(((part % WORD ^ state) + 0x9E3779B97F4A7C15) % WORD)
    assert int(key(*parts)) == state


def test_keys_of_many_numbers_are_the_keys_of_each() -> None:
    numbers = np.array([0, 1, 2, 10**9], dtype=np.int32)
    assert keys(key(7, 3), numbers).tolist() == [int(key(7, 3, int(number))) for number in numbers]


def test_keys_differ_by_value_order_and_number_of_parts() -> None:
    parts = [(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    found = {int(key(*part)) for part in parts} | {int(key(*part[:2])) for part in parts}
    assert len(found) == 8**3 + 8**2


def test_below_covers_its_range_evenly() -> None:
    numbers = below(uniform_bits(key(5), np.arange(200_000)), 20)
    counts = np.bincount(numbers, minlength=20)
    assert len(counts) == 20
    # chi-square with 19 degrees of freedom: 60 is passed with probability 4e-6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 60


@given(words, st.integers(1, 2**31))
def test_below_is_the_upper_half_scaled(bits: int, bound: int) -> None:
    assert below(np.array([bits], dtype=np.uint64), bound).tolist() == [(bits >> 32) * bound >> 32]


@given(words, st.integers(0, 2**40))
def test_single_draws_are_those_of_arrays(seed: int, counter: int) -> None:
    assert scalar_bits(np.uint64(seed), counter) == uniform_bits(np.uint64(seed), np.array([counter]))[0]
    assert scalar_mix64(np.uint64(seed)) == python_mix64(seed)


def test_every_bit_is_set_half_of_the_time() -> None:
    bits = uniform_bits(keys(key(1, 2), np.arange(400)).repeat(100), np.tile(np.arange(100), 400))
    ones = np.array([np.count_nonzero(bits >> np.uint64(place) & np.uint64(1)) for place in range(64)])
    assert np.abs(ones / 40_000 - 0.5).max() < 0.0125  # 5 standard deviations
