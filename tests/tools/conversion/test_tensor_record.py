"""Records of tensors beside those of torch.save, and by the readers of torch and of the standard library."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from megaprot.tools.conversion.tensor_record import record_of

SHAPES = ((), (5,), (3, 7), (2, 3, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_record_says_what_torch_says_of_a_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, theirs = torch.randn(shape).to(dtype), io.BytesIO()
    torch.save(tensor, theirs)
    with zipfile.ZipFile(io.BytesIO(b"".join(record_of(tensor)))) as ours, zipfile.ZipFile(theirs) as expected:
        assert ours.testzip() is None, "a CRC-32 that the standard library does not compute"
        for name in ours.namelist():
            assert ours.read(name) == expected.read(name), name


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_a_record(mapped: bool, tmp_path: Path) -> None:
    tensor = torch.randn(20, 33).to(torch.bfloat16)
    (tmp_path / "record").write_bytes(b"".join(record_of(tensor)))
    loaded = torch.load(tmp_path / "record", weights_only=True, mmap=mapped)
    assert torch.equal(loaded, tensor)
    assert loaded.dtype is tensor.dtype


def test_part_of_a_tensor_is_a_record_of_its_own() -> None:
    whole = torch.arange(10.0)
    record = b"".join(record_of(whole[3:7]))
    assert torch.equal(torch.load(io.BytesIO(record), weights_only=True), whole[3:7])


def test_elements_are_not_copied_and_lie_aligned() -> None:
    tensor = torch.ones(100)
    parts = record_of(tensor)
    (number,) = (number for number, part in enumerate(parts) if len(part) == tensor.nbytes)
    tensor.fill_(2.0)
    assert bytes(parts[number]) == tensor.numpy().tobytes()
    assert sum(map(len, parts[:number])) % 64 == 0
    assert b"".join(record_of(tensor)) == b"".join(record_of(tensor.clone())), "the same weights, other bytes"


def test_a_damaged_element_is_told_by_the_checksum() -> None:
    tensor = torch.randn(100)
    whole = bytearray(b"".join(record_of(tensor)))
    whole[whole.index(tensor.numpy().tobytes())] ^= 1
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        assert archive.testzip() == "archive/data/0"
