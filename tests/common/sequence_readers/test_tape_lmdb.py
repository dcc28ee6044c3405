"""TAPE's LMDBs: records in the order of their numbers, foreign pickles reported and never run, broken files refused."""

import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Record, open_sequences

RECORDS = [{"primary": "ACD" + "K" * number, "protein_length": 3 + number, "id": str(number)} for number in range(12)]


class Runs:
    """Unpickles by making a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write(path: Path, values: list[Any], count: Any = -1, subdir: bool = True) -> Path:
    with lmdb.open(str(path), map_size=1 << 20, subdir=subdir) as environment, environment.begin(write=True) as writing:
        for number, value in enumerate(values):
            writing.put(str(number).encode(), value if isinstance(value, bytes) else pickle.dumps(value))
        writing.put(b"num_examples", pickle.dumps(len(values) if count == -1 else count))
    return path


@pytest.mark.parametrize("is_folder", [True, False])
def test_records_come_by_number_and_not_as_keys_sort(tmp_path: Path, is_folder: bool) -> None:
    path = write(tmp_path / "pfam.lmdb", RECORDS, subdir=is_folder)
    reader = open_sequences(path)
    assert list(reader) == [Record(str(number), "", b"ACD" + b"K" * number, number) for number in range(len(RECORDS))]
    stored = path / "data.mdb" if is_folder else path
    assert (reader.num_bytes, reader.sha256) == (
        stored.stat().st_size,
        hashlib.sha256(stored.read_bytes()).hexdigest(),
    )
    assert list(reader) == list(reader), "a reader can be gone through again"


def test_arrays_and_numbers_beside_the_sequence_do_no_harm(tmp_path: Path) -> None:
    record = {"primary": "ACD", "id": b"x", "clan": 3, "family": 67, "ss3": np.arange(3), "score": np.float32(2)}
    (block,) = open_sequences(write(tmp_path / "x.lmdb", [record])).blocks()
    assert (block.identifier(0), block.letters.tobytes(), block.families.tolist()) == ("x", b"ACD", [-1])


def test_a_foreign_pickle_is_reported_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "x.lmdb", [RECORDS[0], {"primary": Runs(marker)}, RECORDS[2]])
    messages: list[str] = []
    read = [record.identifier for record in open_sequences(path, on_bad_record=messages.append)]
    assert read == ["0", "2"]
    assert messages == [
        f"{path}, record 1: the record is damaged or not what it should be (it asks for posix.mkdir); it was not loaded"
    ]
    with pytest.raises(InputError, match=r"record 1: .* correct it, or skip such records"):
        list(open_sequences(path))
    with pytest.raises(InputError, match="no 'num_examples' that counts them"):
        list(open_sequences(write(tmp_path / "y.lmdb", RECORDS, count=Runs(marker))))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"id": "x"}, "the record has no 'primary', only 'id'"),
        ({"primary": np.zeros(3)}, "the record's 'primary' is not text"),
        ({"primary": "", "id": "x"}, "record 'x' has no sequence"),
        (["ACD"], "the record is not an object with keys"),
        (b"text", "the record is damaged or not what it should be ("),
        (b"", "the record is damaged or not what it should be ("),
    ],
)
def test_a_bad_record_is_skipped_where_the_callback_returns(tmp_path: Path, value: Any, said: str) -> None:
    path = write(tmp_path / "x.lmdb", [RECORDS[0], value, RECORDS[2]])
    messages: list[str] = []
    assert [record.line for record in open_sequences(path, on_bad_record=messages.append)] == [0, 2]
    assert [message.startswith(f"{path}, record 1: {said}") for message in messages] == [True]


def test_a_missing_record_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", RECORDS[:3])
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as writing:
        writing.delete(b"1")
        writing.put(b"other", b"")
    with pytest.raises(InputError, match=r"x\.lmdb, record 1: the record is missing"):
        list(open_sequences(path))


@pytest.mark.parametrize("count", [None, "3", -2, 4, 10**12])
def test_a_count_that_is_wrong_is_refused(tmp_path: Path, count: Any) -> None:
    path = write(tmp_path / "x.lmdb", RECORDS[:3], count=count)
    with pytest.raises(InputError, match=r"x\.lmdb: holds 4 entries and no 'num_examples' that counts them"):
        list(open_sequences(path))


def test_an_lmdb_without_records_is_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        list(open_sequences(write(tmp_path / "x.lmdb", [])))


def test_a_truncated_or_damaged_file_is_refused_and_does_not_kill_the_process(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.lmdb", RECORDS * 100, subdir=False).read_bytes()
    page = 4096
    for content, said in [
        (whole[: 5 * page], r"has 20,480 bytes of .*: the file is truncated"),
        (whole[:100], "is damaged or no LMDB|is truncated"),
        (bytes(len(whole)), "is no LMDB: give an LMDB of TAPE"),
        (b"", "is empty"),
    ]:
        (tmp_path / "x.lmdb").write_bytes(content)
        with pytest.raises(InputError, match=rf"x\.lmdb: .*({said})"):
            list(open_sequences(tmp_path / "x.lmdb", "tape_lmdb"))
    with pytest.raises(InputError, match=r"absent: cannot be read \(No such file"):
        list(open_sequences(tmp_path / "absent", "tape_lmdb"))
    with pytest.raises(InputError, match="an LMDB cannot be read from standard input"):
        list(open_sequences("-", "tape_lmdb"))


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.lmdb", RECORDS)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match=r"needs the package lmdb: pip install 'megaprot\[data\]'"):
        list(open_sequences(path))
