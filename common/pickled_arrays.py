"""What stands in for numpy while a pickle from outside is read.

numpy's own functions trust a pickle: the state of a dtype can claim that a field of raw bytes holds no objects, and
the bytes are then followed as pointers. The stand-ins take numbers and text of fixed width only, and check the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_PLAIN_TYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|c(?:8|16)|[SU]\d{1,9})")


class _PickledType:
    """Stands in for ``numpy.dtype``: a type by its name, then its byte order as state."""

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(name, str) or not _PLAIN_TYPE.fullmatch(name):
            raise ValueError(f"it asks for an array of type {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        _version, byte_order, *structure = state
        if byte_order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]):
            raise ValueError("it asks for an array of a structured type")
        if byte_order != "|":
            self.dtype = self.dtype.newbyteorder(byte_order)


class _PickledArray(np.ndarray[Any, Any]):
    """An array that is empty until its state fills it."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, is_fortran, content = state
        array = _array(content, kind, shape, "F" if is_fortran else "C")
        plain: Any = (1, array.shape, array.dtype, bool(is_fortran), array.tobytes("A"))
        super().__setstate__(plain)


def _array(content: Any, kind: Any, shape: Any, order: Any = "C", axis_order: Any = None) -> Any:
    """Return the array of these bytes; stands in for ``numpy.core.numeric._frombuffer`` too."""
    if not isinstance(kind, _PickledType) or not isinstance(content, bytes | bytearray):
        raise ValueError("it asks for an array of something else than numbers or text")
    if order not in ("C", "F") or axis_order is not None:
        raise ValueError("it asks for an array in an order of its own")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError("it asks for an array of no possible shape")
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise ValueError("it holds an array of another size than its own")
    if not content:
        return np.empty(shape, kind.dtype)
    return np.frombuffer(bytes(content), kind.dtype).reshape(shape, order=order)


def _reconstruct(subtype: Any, shape: Any, type_code: Any) -> _PickledArray:
    """Stand in for ``numpy.core.multiarray._reconstruct``, whose arguments mean nothing but an empty array."""
    return _PickledArray(0)


def _scalar(kind: Any, content: Any) -> Any:
    """Stand in for ``numpy.core.multiarray.scalar``."""
    return _array(content, kind, ())[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand in for ``_codecs.encode``, by which pickles of protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("it asks for an encoding")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand in for ``bytes``, by which the same protocols write empty bytes."""
    return b""


class _StandIn:
    """Calls a function and no more: of a bare function, a pickle could set attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it asks to change what builds it")


_FUNCTIONS = {
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "numpy.dtype": _PickledType,
    **{
        f"{core}.{name}": function
        for core in ("numpy.core", "numpy._core")  # numpy 1 and 2
        for name, function in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array),
        )
    },
}
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument of _reconstruct
    **{(path.rpartition(".")[0], path.rpartition(".")[2]): _StandIn(call) for path, call in _FUNCTIONS.items()},
}
"""{(module, name) that a pickle asks for: what it gets}."""
