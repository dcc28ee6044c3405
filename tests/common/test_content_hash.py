"""Content hashes: what they depend on, and that nothing near collides."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.content_hash import content_hashes

sequences = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=10)


def hashes(pieces: list[list[int]], dtype: type[np.integer] = np.uint8) -> list[int]:
    bounds = np.concatenate(([0], np.cumsum([len(piece) for piece in pieces])))
    return content_hashes(np.array([number for piece in pieces for number in piece], dtype=dtype), bounds).tolist()


@given(sequences, st.sampled_from([np.uint8, np.uint16]))
def test_a_hash_depends_on_the_sequence_and_on_nothing_beside_it(
    pieces: list[list[int]], dtype: type[np.integer]
) -> None:
    assert hashes(pieces, dtype) == [hashes([piece], dtype)[0] for piece in pieces]


@given(sequences, st.sampled_from([np.uint8, np.uint16]))
def test_different_sequences_have_different_hashes(pieces: list[list[int]], dtype: type[np.integer]) -> None:
    assert len(set(hashes(pieces, dtype))) == len({tuple(piece) for piece in pieces})


def test_one_residue_length_or_place_changes_the_hash() -> None:
    base = list(range(5, 25)) * 2
    near = [base[:length] for length in range(1, 41)] + [[0] * length for length in range(1, 41)]
    near += [[*base[:place], other, *base[place + 1 :]] for place in range(40) for other in range(30, 60)]
    near += [[*base[:place], base[place + 1], base[place], *base[place + 2 :]] for place in range(39)]
    assert len(set(hashes(near))) == len(near)
    assert hashes([[1, 0]], np.uint16) != hashes([[256, 0]], np.uint16)


def test_every_bit_is_set_half_of_the_time() -> None:
    found = np.array(hashes([[number % 256, number // 256] for number in range(40_000)]), dtype=np.uint64)
    ones = np.array([np.count_nonzero(found >> np.uint64(place) & np.uint64(1)) for place in range(64)])
    assert np.abs(ones / 40_000 - 0.5).max() < 0.0125  # 5 standard deviations
