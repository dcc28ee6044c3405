"""Read pickles that may come from anywhere without running what is in them: only named harmless types are built."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from megaprot.common.errors import InputError
from megaprot.common.pickled_arrays import STAND_INS


class BadPickle(ValueError):
    """A pickle that is damaged or asks for what it may not have; the text is a clause."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Refuses every global that is not on the list; without globals a pickle can only build plain containers."""

    def __init__(
        self, stream: IO[bytes], allowed: Collection[tuple[str, str]], stand_ins: Mapping[tuple[str, str], Any]
    ) -> None:
        super().__init__(stream)
        self.allowed = allowed
        self.stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function a pickle names, or what stands in for it, if it may have that."""
        if (module, name) in self.stand_ins:
            return self.stand_ins[module, name]
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def load_restricted(path: Path, allowed: Collection[tuple[str, str]]) -> Any:
    """Return the object pickled in ``path``, building nothing but plain containers and the types ``allowed``.

    Args:
        path: File to read.
        allowed: (module, name) of each class or function the pickle may use.

    Raises:
        InputError: The file is damaged, or asks for anything else; nothing of it has run then.
    """
    try:
        with path.open("rb") as stream:
            return _RestrictedUnpickler(stream, allowed, {}).load()
    except Exception as error:
        raise InputError(f"{path} is damaged or not what it should be ({error}); it was not loaded.") from error


def loads_restricted(content: bytes | memoryview) -> Any:
    """Return the object pickled in ``content``: plain containers and values, numpy arrays and scalars, nothing else.

    None of numpy's own functions is called for them, see ``megaprot.common.pickled_arrays``.

    Raises:
        BadPickle: The content is damaged, or asks for anything else; nothing of it has run then.
    """
    try:
        return _RestrictedUnpickler(io.BytesIO(content), (), STAND_INS).load()
    except Exception as error:
        raise BadPickle(f"is damaged or not what it should be ({error}); it was not loaded") from None
