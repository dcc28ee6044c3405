"""Vectors are made once, and kept from run to run where a folder is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.finetune.function.vector_cache import VectorCache, cache_path

TABLE = torch.arange(40.0).reshape(10, 4)


class Maker:
    """Makes vectors of some keys and remembers of which."""

    def __init__(self, keys: list[int]) -> None:
        self.keys, self.made = np.array(keys), list[int]()

    def __call__(self, missing: np.ndarray) -> Tensor:
        self.made += self.keys[missing].tolist()
        return TABLE[torch.from_numpy(self.keys[missing])]


def asked(cache: VectorCache, keys: list[int]) -> list[int]:
    """Ask for keys, check what comes, and return those that had to be made."""
    make = Maker(keys)
    assert torch.equal(cache.get(make.keys, make), TABLE[torch.tensor(keys)])
    return make.made


def test_only_what_is_not_known_is_made() -> None:
    cache = VectorCache(10)
    assert asked(cache, [3, 7]) == [3, 7]
    assert asked(cache, [7, 1, 3]) == [1]
    assert asked(cache, [1, 3, 7, 7]) == []


def test_what_is_saved_is_known_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "terms.safetensors"
    first = VectorCache(10, path)
    first.save()
    assert not path.exists()  # nothing to keep
    asked(first, [2, 5])
    first.save()
    second = VectorCache(10, path)
    assert asked(second, [5, 2, 9]) == [9]


def test_a_file_that_is_damaged_or_of_other_data_is_named(tmp_path: Path) -> None:
    path = tmp_path / "terms.safetensors"
    cache = VectorCache(10, path)
    asked(cache, [2])
    cache.save()
    with pytest.raises(InputError, match="other data"):
        VectorCache(11, path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        VectorCache(10, path)


def test_a_name_stands_for_all_that_the_vectors_are_made_of() -> None:
    assert cache_path("", "terms", ["a"]) is None
    names = {cache_path("kept", "terms", parts) for parts in (["a", "b"], ["ab"], [b"a", "c"], ["a", "b", ""])}
    assert len(names) == 4
    assert cache_path("kept", "terms", ["a", "b"]) == cache_path("kept", "terms", [b"a", "b"])
