"""Where the objects of a JSON list begin and end, so that a list of any size is read object by object."""

import numba
import numpy as np
from numpy.typing import NDArray

_QUOTE, _BACKSLASH, _OPEN, _CLOSE, _LIST_END, _COMMA = 34, 92, 123, 125, 93, 44
# What ended a scan: the text (more is needed), the list, or something that is no object.
TEXT_END, LIST_END, NO_OBJECT = 0, 1, 2


@numba.njit(cache=True, nogil=True)
def find_objects(text: NDArray[np.uint8], objects: NDArray[np.int64]) -> tuple[int, int, int]:
    """Fill ``objects`` [n, 2] with begin and end of the objects of a list; ``text`` begins between two of them.

    Return how many were found, the place up to which the text is done with, and what ended the scan. It also ends, as
    at the end of the text, where ``objects`` is full. Native since Python's own decoder cannot stop at half an object.
    """
    num_objects, place = 0, 0
    while place < len(text) and num_objects < len(objects):
        byte = text[place]
        if byte == _OPEN:
            end = _object_end(text, place)
            if end < 0:
                break
            objects[num_objects, 0], objects[num_objects, 1] = place, end
            num_objects += 1
            place = end
        elif byte == _LIST_END:
            return num_objects, place + 1, LIST_END
        elif byte == _COMMA or byte == 32 or 9 <= byte <= 13:
            place += 1
        else:
            return num_objects, place, NO_OBJECT
    return num_objects, place, TEXT_END


@numba.njit(cache=True, nogil=True)
def _object_end(text: NDArray[np.uint8], start: int) -> int:
    """Return the place behind the object that begins at ``start``, -1 where the text ends before it does."""
    depth, is_string, place = 0, False, start
    while place < len(text):
        byte = text[place]
        if is_string:
            if byte == _BACKSLASH:
                place += 1
            elif byte == _QUOTE:
                is_string = False
        elif byte == _QUOTE:
            is_string = True
        elif byte == _OPEN:
            depth += 1
        elif byte == _CLOSE:
            depth -= 1
            if depth == 0:
                return place + 1
        place += 1
    return -1
