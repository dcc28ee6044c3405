"""Compressed input of every make: what comes out, what is counted, and how a broken file is named."""

import gzip
import hashlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import source
from megaprot.common.sequence_readers.source import HEAD_BYTES, Source

Compress = Callable[[bytes], bytes]
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"  # as pzstd begins its files


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


class Trickle(io.BytesIO):
    """Gives one byte at a time, as a slow pipe may."""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return super().readinto(memoryview(buffer)[:1])


def read(path: Path) -> bytes:
    with Source(path).content() as stream:
        return stream.read()


@given(
    parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    compress=st.sampled_from([bytes, gzip.compress, zstd]),
    input_bytes=st.integers(1, 40),
)
def test_content_is_what_was_compressed_in_one_part_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[bytes], compress: Compress, input_bytes: int
) -> None:
    monkeypatch.setattr(source, "_ZSTD_INPUT_BYTES", input_bytes)
    stored = b"".join(map(compress, parts))
    path = tmp_path / "file"
    path.write_bytes(stored)
    opened = Source(path)
    with opened.content() as stream:
        assert stream.read() == b"".join(parts)
    assert (opened.num_bytes, opened.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())


def test_a_frame_to_be_skipped_may_come_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(SKIPPABLE_FRAME + zstd(b">a\nACD\n"))
    assert read(tmp_path / "file") == b">a\nACD\n"


def test_a_large_frame_is_given_in_pieces(tmp_path: Path) -> None:
    content = b"ACDEFGHIKL" * 500_000  # far more than goes in, as a buffer of any size sees it
    (tmp_path / "file").write_bytes(zstd(content))
    with Source(tmp_path / "file").content() as stream:
        assert b"".join(iter(lambda: stream.read(70_001), b"")) == content


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_looking_at_the_head_leaves_everything_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Compress
) -> None:
    content = b"ACDEF" * HEAD_BYTES
    stored = compress(content)
    (tmp_path / "file").write_bytes(stored)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Trickle(stored)))
    for opened in (Source(tmp_path / "file"), Source("-")):
        assert opened.head() == content[:HEAD_BYTES]
        with opened.content() as stream:
            assert stream.read() == content
        assert (opened.num_bytes, opened.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
@given(data=st.data())
def test_a_truncated_file_never_passes_for_a_whole_one(tmp_path: Path, compress: Compress, data: st.DataObject) -> None:
    stored = compress(b"ACDEFGHIKLMNPQRSTVWY" * 20) * 2
    half = len(stored) // 2
    length = data.draw(st.integers(4, len(stored) - 1).filter(lambda length: length != half))
    (tmp_path / "file").write_bytes(stored[:length])
    with pytest.raises(InputError, match="file: the compressed file is truncated: copy or download it again"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    "stored", [zstd(b"ACD")[:-1] + b"\xff" * 9, zstd(b"ACD") + b"behind", zstd(b"ACD")[:4] + b"\xff" * 30]
)
def test_a_damaged_file_is_named(tmp_path: Path, stored: bytes) -> None:
    (tmp_path / "file").write_bytes(stored)
    with pytest.raises(InputError, match=r"file: the compressed file is damaged \(.*\): copy it again"):
        read(tmp_path / "file")


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(zstd(b"ACD"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"needs the package zstandard: pip install 'megaprot\[data\]'"):
        read(tmp_path / "file")
