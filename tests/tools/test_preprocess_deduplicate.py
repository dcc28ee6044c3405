"""Exact duplicates: against a set of all sequences seen, whatever the hashes, buckets and blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.content_hash import content_hashes
from megaprot.tools.preprocessing import deduplicate, parts
from megaprot.tools.preprocessing.deduplicate import Duplicates, SequenceColumns
from tests.tools.preprocess_runs import made_sequences, preprocess, texts, write_fasta

Sequences = list[list[bytes]]


def columns_of(sequences: list[bytes], hash_mask: int) -> SequenceColumns:
    ids = np.frombuffer(b"".join(sequences), dtype=np.uint8)
    lengths = np.array([len(text) for text in sequences], dtype=np.int32)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return SequenceColumns(lambda: ids, lengths, content_hashes(ids, bounds) & np.uint64(hash_mask))


@given(
    sequences=st.lists(
        st.lists(st.binary(min_size=1, max_size=3).map(lambda text: bytes(b % 3 for b in text)), max_size=12),
        max_size=4,
    ),
    hash_mask=st.sampled_from([2**64 - 1, 0, 1, 2**63]),
    bucket_sequences=st.integers(1, 8),
    block=st.integers(1, 9),
)
def test_all_but_the_first_of_equal_sequences_are_found_whatever_they_share_hashes_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sequences: Sequences,
    hash_mask: int,
    bucket_sequences: int,
    block: int,
) -> None:
    monkeypatch.setattr(deduplicate, "BUCKET_SEQUENCES", bucket_sequences)
    monkeypatch.setattr(deduplicate, "_READ_SEQUENCES", block)
    monkeypatch.setattr(deduplicate, "_COMPARED_PAIRS", block)
    monkeypatch.setattr(parts, "BLOCK_IDS", 2 * block)
    columns: list[Any] = [columns_of(texts, hash_mask) for texts in sequences]
    found = Duplicates(columns, tmp_path)
    seen: set[bytes] = set()
    for number, column in enumerate(sequences):
        expected = []
        for text in column:
            expected.append(text in seen)
            seen.add(text)
        assert found.of_column(number).tolist() == expected
    assert not list(tmp_path.iterdir())


def test_the_corpora_hold_the_first_of_equal_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = made_sequences(100)
    first = write_fasta(tmp_path / "a.fasta", [*sequences[:60], *sequences[20:40]])
    second = write_fasta(tmp_path / "b.fasta", [text.lower() for text in sequences[50:]])
    corpora = preprocess([first, second], tmp_path / "out", deduplicate=True, split={"valid": 0.3})
    found = {name: texts(corpus) for name, corpus in corpora.items()}
    assert sorted(found["train"] + found["valid"]) == sorted(sequences)
    assert found["train"] == [text for text in sequences if text in found["train"]]
    manifest = corpora["train"].manifest
    assert manifest["deduplicated"]
    assert [source["num_duplicates"] for source in manifest["sources"]] == [20, 10]
    assert [source["num_sequences"] for source in manifest["sources"]] == [60, 40]
    assert "duplicates left out: 30 sequences" in capsys.readouterr().out


def test_families_split_apart_share_no_sequence(tmp_path: Path) -> None:
    sequences = made_sequences(300)
    inputs = [
        write_fasta(tmp_path / "a.fasta", sequences, [number % 9 + 1 for number in range(300)]),
        write_fasta(tmp_path / "b.fasta", sequences, [number % 7 + 20 for number in range(300)]),
    ]
    corpora = preprocess(inputs, tmp_path / "out", deduplicate=True, split={"by": "family", "valid": 0.4})
    found = [*texts(corpora["train"]), *texts(corpora["valid"])]
    assert len(found) == len(set(found)) == len(set(sequences))
    assert not preprocess(inputs, tmp_path / "b", split={"valid": 0.4})["train"].manifest["deduplicated"]
