"""Native loops that turn FASTA text into columns: a Python loop over records would be twenty times slower."""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from megaprot.common.sequence_readers.block import NO_FAMILY

# What is wrong with a record.
GOOD, BINARY, NO_IDENTIFIER, NO_SEQUENCE = 0, 1, 2, 3

_NEWLINE, _RETURN, _SPACE, _DOT, _SEMICOLON, _MARK = 10, 13, 32, 46, 59, 62  # _MARK: the ">" of a header
_WORD_BYTES = 8
_LIMIT = 14  # every byte below is a control character, among them NUL and the line ends
_LIMITS = np.uint64(0x0E0E0E0E0E0E0E0E)
_HIGH_BITS = np.uint64(0x8080808080808080)
_NO_BITS = np.uint64(0)


def padding(num_bytes: int) -> bytes:
    """Return the line ends to add to a text of that size before it is scanned."""
    return b"\n" * (2 * _WORD_BYTES - num_bytes % _WORD_BYTES)


@intrinsic
def _copy_bytes(_context: Any, to: Any, to_start: Any, source: Any, start: Any, num_bytes: Any) -> Any:
    """Copy bytes between uint8 arrays as C's memcpy does: a line is too short for the checks of slices."""
    copy: Any = cgutils.raw_memcpy

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = [
            builder.gep(context.make_array(kind)(context, builder, array).data, [place])
            for kind, array, place in ((signature.args[0], *values[:2]), (signature.args[2], *values[2:4]))
        ]
        copy(builder, *places, values[4], 1)
        return context.get_dummy_value()

    return types.none(to, types.int64, source, types.int64, types.int64), generate


_copy: Any = _copy_bytes  # as it is called in native code: without the context


@numba.njit(cache=True, nogil=True)
def find_controls(words: NDArray[np.uint64], text: NDArray[np.uint8], controls: NDArray[np.int64]) -> int:
    """Put the places of all bytes below 14 into ``controls`` [len(text) + 1]; return their number.

    ``words`` are the bytes of ``text`` eight at a time, tested at once (Mycroft 1987).
    """
    num_controls = 0
    for word in range(len(words)):
        bits = words[word]
        if (bits - _LIMITS) & ~bits & _HIGH_BITS != _NO_BITS:
            for place in range(word * _WORD_BYTES, (word + 1) * _WORD_BYTES):
                controls[num_controls] = place
                num_controls += text[place] < _LIMIT
    return num_controls


@numba.njit(cache=True, nogil=True)
def scan_records(
    text: NDArray[np.uint8],
    size: int,
    line: int,
    controls: NDArray[np.int64],
    letters: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    header_bounds: NDArray[np.int64],
    families: NDArray[np.int32],
    lines: NDArray[np.int64],
    faults: NDArray[np.uint8],
) -> tuple[int, int]:
    """Fill the columns of a SequenceBlock from the first ``size`` bytes of ``text``.

    Return how many records there are and the number of the line behind them.

    These are whole records, the first header at their beginning and at line ``line``; ``padding`` follows them.
    ``controls`` is from ``find_controls``. ``faults`` says what is wrong with each record; one with a
    fault leaves no letters.
    """
    place, control, num_letters, record = 0, 0, 0, 0
    while place < size:
        is_binary = False
        start = place + 1
        while text[controls[control]] != _NEWLINE:
            is_binary = is_binary or text[controls[control]] == 0
            control += 1
        end = controls[control]
        control += 1
        place = end + 1
        lines[record] = line
        line += 1
        while start < end and _is_space(text[start]):
            start += 1
        while start < end and _is_space(text[end - 1]):
            end -= 1
        header_bounds[record, 0], header_bounds[record, 1] = start, end
        while place < size and text[place] != _MARK:
            stop = controls[control]
            while text[stop] != _NEWLINE:  # a control character inside the line
                _copy(letters, num_letters, text, place, stop - place)
                num_letters += stop - place
                is_binary = is_binary or text[stop] == 0
                if text[stop] != _RETURN:
                    letters[num_letters] = text[stop]
                    num_letters += 1
                place = stop + 1
                control += 1
                stop = controls[control]
            _copy(letters, num_letters, text, place, stop - place)
            num_letters += stop - place
            place = stop + 1
            control += 1
            line += 1
        faults[record] = _fault(is_binary, start == end, num_letters == bounds[record])
        if faults[record] != GOOD:
            num_letters = bounds[record]
        families[record] = _family(text, start, end)
        record += 1
        bounds[record] = num_letters
    return record, line


@numba.njit(cache=True, nogil=True)
def _fault(is_binary: bool, is_nameless: bool, is_empty: bool) -> int:
    if is_binary:
        return BINARY
    if is_nameless:
        return NO_IDENTIFIER
    return NO_SEQUENCE if is_empty else GOOD


@numba.njit(cache=True, nogil=True)
def _family(text: NDArray[np.uint8], start: int, end: int) -> int:
    """Return 67 for a description with the word ``PF00067.25;...``, as ``Record.family`` does, NO_FAMILY for none."""
    while start < end and not _is_space(text[start]):  # the identifier
        start += 1
    for place in range(start, end - 8):  # of the space before the word
        if text[place + 1] == 80 and text[place + 2] == 70 and _is_space(text[place]):  # "PF"
            after = _after_digits(text, place + 3, end)
            num_digits = after - place - 3
            if num_digits < 5 or num_digits > 9 or after == end:
                continue
            last = _after_digits(text, after + 1, end) if text[after] == _DOT else after
            if last < end and text[last] == _SEMICOLON and last != after + 1:
                number = 0
                for digit in text[place + 3 : after]:
                    number = number * 10 + int(digit) - 48
                return number
    return NO_FAMILY


@numba.njit(cache=True, nogil=True)
def _after_digits(text: NDArray[np.uint8], start: int, end: int) -> int:
    while start < end and 48 <= text[start] <= 57:
        start += 1
    return start


@numba.njit(cache=True, nogil=True)
def _is_space(byte: int) -> bool:
    """Tell whether Python's ``bytes.split`` would split here."""
    return byte == _SPACE or 9 <= byte <= _RETURN
