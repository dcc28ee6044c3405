"""Pickles from outside: plain containers and named types are built, nothing else is, and nothing ever runs."""

import codecs
import collections
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy._core.multiarray import _reconstruct, scalar

from megaprot.common.errors import InputError
from megaprot.common.safe_pickle import BadPickle, load_restricted, loads_restricted

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def written(folder: Path, value: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path = folder / "file.pickle"
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_come_back(value: Any, protocol: int, tmp_path: Path) -> None:
    # Protocols up to 2 write bytes as a call of a codec, which is no plain value.
    path = written(tmp_path, value, protocol)
    allowed = {("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes")} if protocol < 3 else set()
    assert load_restricted(path, allowed) == value


def test_allowed_types_are_built_and_others_named(tmp_path: Path) -> None:
    path = written(tmp_path, [Fraction(1, 3)])
    assert load_restricted(path, {("fractions", "Fraction")}) == [Fraction(1, 3)]
    with pytest.raises(InputError, match=r"file\.pickle is damaged .*asks for fractions\.Fraction.*not loaded"):
        load_restricted(path, {("collections", "OrderedDict")})


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, open])
def test_no_call_of_a_function_runs(function: Any, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    texts = {os.system: f"touch {marker}", open: str(marker)}
    code = texts.get(function, f"open({str(marker)!r}, 'w')")
    arguments = (code, "w") if function is open else (code,)
    path = written(tmp_path, {"state": [Calls(function, *arguments)]}, protocol)
    with pytest.raises(InputError, match="it asks for"):
        load_restricted(path, {("collections", "OrderedDict"), ("builtins", "dict")})
    assert not marker.exists()


@pytest.mark.parametrize("name", ["OrderedDict.fromkeys", "OrderedDict.__init__.__globals__", "abc.sys", "_sys"])
def test_a_path_through_an_allowed_type_or_its_module_is_refused(name: str, tmp_path: Path) -> None:
    # STACK_GLOBAL takes dotted names: an allowed class must not open the way to its attributes.
    path = tmp_path / "file.pickle"
    pushed = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in ("collections", name))
    path.write_bytes(b"\x80\x04" + pushed + b"\x93.")
    with pytest.raises(InputError, match="it asks for collections"):
        load_restricted(path, {("collections", "OrderedDict")})


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"\x80\x04P123\n.", b"\x80\x04\x97.", b"\x80\xff."])
def test_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.pickle is damaged or not what it should be"):
        load_restricted(path, set())


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_or_another_value_but_never_a_crash(place: int, bit: int, tmp_path: Path) -> None:
    content = bytearray(pickle.dumps({"weights": collections.OrderedDict(a=[1, 2.5, "x"])}))
    content[place % len(content)] ^= 1 << bit
    path = tmp_path / "file.pickle"
    path.write_bytes(content)
    try:
        load_restricted(path, {("collections", "OrderedDict")})
    except InputError as error:
        assert str(path) in str(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        load_restricted(tmp_path / "absent", set())


ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
    np.array([True, False]),
    np.array(["ACD", "é"]),
    np.array([b"AC", b"D"]),
    np.zeros((0, 3), dtype=np.float16),
    np.array(2.5),
    np.float32(0.25),
    np.int64(-7),
    np.bool_(True),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=repr)
def test_arrays_and_scalars_come_back_without_numpys_own_functions(array: Any, protocol: int) -> None:
    read = loads_restricted(pickle.dumps({"labels": [array]}, protocol))["labels"][0]
    np.testing.assert_array_equal(read, array)
    assert (read.dtype.newbyteorder("="), read.shape) == (array.dtype.newbyteorder("="), array.shape)


@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_come_back_from_bytes(value: Any, protocol: int) -> None:
    assert loads_restricted(memoryview(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.array([{"a": 1}, None], dtype=object),
        np.zeros(2, dtype=[("x", "i4"), ("y", object)]),
        np.zeros(2, dtype=[("x", "i4")]),
        np.zeros(2, dtype="V8"),
        np.zeros(2, dtype="M8[s]"),
        np.ma.masked_array([1, 2]),
    ],
    ids=str,
)
def test_arrays_of_anything_but_numbers_and_text_are_refused(array: Any, protocol: int) -> None:
    with pytest.raises(BadPickle, match=r"it asks for|of an array|not what it should be"):
        loads_restricted(pickle.dumps(array, protocol))


class Forged:
    """Pickles as a call of one of numpy's functions with arguments and a state that numpy never writes."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def int_type(state: Any = (3, "<", None, None, None, -1, -1, 0)) -> Forged:
    return Forged(np.dtype, "i8", False, True, state=state)


@pytest.mark.parametrize(
    "forged",
    [
        Forged(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0)),
        Forged(np.dtype, "i8", False, True, state=(3, "|", None, ("x",), {"x": (int_type(), 0)}, 8, 8, 0)),
        Forged(_reconstruct, np.ndarray, (0,), b"b", state=(1, (2,), int_type(), False, b"\1" * 8)),
        Forged(_reconstruct, np.ndarray, (0,), b"b", state=(1, (-1,), int_type(), False, b"")),
        Forged(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1 << 62, 4), int_type(), False, b"")),
        Forged(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), int_type(), False, [print])),
        Forged(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), "O", False, [1])),
        Forged(np.ndarray, (4,), "O"),
        Forged(scalar, int_type(), b"\1"),
        Forged(codecs.encode, "abc", "zlib_codec"),
        Forged(bytes, 1 << 40),
    ],
)
def test_forged_arrays_are_refused(forged: Forged) -> None:
    with pytest.raises(BadPickle):
        loads_restricted(pickle.dumps(forged))


@pytest.mark.parametrize("name", ["numpy.core.multiarray scalar", "numpy dtype", "_codecs encode", "numpy ndarray"])
def test_what_builds_arrays_cannot_be_changed_by_a_pickle(name: str) -> None:
    # GLOBAL, then BUILD with (None, {"__defaults__": (1,)}): attributes set on the very function.
    content = b"c" + name.replace(" ", "\n").encode() + b"\n(N(U\x0c__defaults__(I1\ntdtb."
    with pytest.raises(BadPickle):
        loads_restricted(content)


@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load, np.frombuffer])
def test_no_call_in_bytes_runs(function: Any) -> None:
    with pytest.raises(BadPickle, match="it asks for"):
        loads_restricted(pickle.dumps(Calls(function, "true")))
