"""Folders whose files are listed with size and checksum: what is wrong with one is named."""

import hashlib
import json
from pathlib import Path

import pytest

from megaprot.common.manifest import MANIFEST, damaged_file, problem_of, sizes_and_checksums, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    for name in ("one", "two", "inner/three"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path, "a-kind", sizes_and_checksums(tmp_path, ["one", "two", "inner/three"]))
    return tmp_path


def test_a_manifest_says_sizes_and_checksums(folder: Path) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    assert (found["format"], found["version"]) == ("a-kind", 1)
    content = (folder / "inner/three").read_bytes()
    assert found["files"]["inner/three"] == {
        "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    assert problem_of(folder, ["one", "inner/three"]) == ""
    assert damaged_file(folder) == ""


def test_missing_short_and_unlisted_files_are_problems(folder: Path) -> None:
    assert problem_of(folder, ["four"]) == f"{folder / MANIFEST} does not list all parts"
    (folder / "two").write_bytes(b"two")
    assert problem_of(folder) == f"{folder / 'two'} has 3 bytes instead of 300"
    (folder / "one").unlink()
    assert problem_of(folder) == f"{folder / 'one'} is missing"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"one": 3}}', b"\xff"])
def test_a_damaged_manifest_is_named(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert problem_of(folder) == f"{folder / MANIFEST} is damaged"
    (folder / MANIFEST).unlink()
    assert problem_of(folder) == f"{folder / MANIFEST} is missing"


def test_a_flipped_bit_is_found_by_whoever_looks_at_its_share(folder: Path) -> None:
    content = bytearray((folder / "one").read_bytes())
    content[7] ^= 1
    (folder / "one").write_bytes(content)
    assert problem_of(folder) == ""
    assert damaged_file(folder) == damaged_file(folder, ["one", "two"]) == str(folder / "one")
    assert damaged_file(folder, ["two"]) == ""
    shares = [damaged_file(folder, share=share, num_shares=2) for share in range(2)]  # inner/three, one, two
    assert shares == ["", str(folder / "one")]
