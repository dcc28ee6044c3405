"""Labelled proteins of all formats, every record kept, and one sentence with the record's number for a bad one."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns
from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.config import LabelConfig
from megaprot.finetune.examples import Example, find_split, read_examples, read_unlabelled
from megaprot.finetune.tasks import open_task

ESM = get_vocabulary("esm")
RECORDS: dict[str, dict[str, Any]] = {
    "fluorescence": {"primary": "MSKGEELFTG", "log_fluorescence": [3.5], "id": "a"},
    "stability": {"primary": "MSKGEELFTG", "stability_score": [-0.25]},
    "remote_homology": {"primary": "MSKGEELFTG", "fold_label": 1194},
    "secondary_structure": {"primary": "MSKGE", "ss3": [0, 1, 2, 2, -1], "ss8": [1, 4, 7, 0, 6]},
    "contact_prediction": {
        "primary": "MSKG",
        "tertiary": [[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]],
        "valid_mask": [True, True, False, True],
    },
}
FOLDERS = {"contact_prediction": "proteinnet"}


def write_json(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def write_lmdb(path: Path, records: list[Any], as_arrays: bool = True) -> Path:
    """As TAPE ships its data: lists are numpy arrays, and the count is a record of its own."""
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment, environment.begin(write=True) as store:
        for number, record in enumerate(records):
            arrays = {key: np.asarray(value) if as_arrays and isinstance(value, list) else value
                      for key, value in record.items()}  # fmt: skip
            store.put(b"%d" % number, pickle.dumps(arrays))  # tests write what users have
        store.put(b"num_examples", pickle.dumps(len(records)))
    return path


def read(task: str, path: Path, name: str = "train", labels: LabelConfig | None = None) -> list[Example]:
    opened = open_task(task, labels or LabelConfig())
    return read_examples(find_split(path, opened.folder, name), opened.labels, ESM, opened.label_of)


def refused(task: str, path: Path, labels: LabelConfig | None = None, name: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        opened = open_task(task, labels or LabelConfig())
        examples = read_examples(find_split(path, opened.folder, name), opened.labels, ESM, opened.label_of)
        opened.check(examples, str(path))
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("task", RECORDS)
def test_json_and_lmdb_of_tape_give_the_same_examples(task: str, tmp_path: Path) -> None:
    folder, records = FOLDERS.get(task, task), [RECORDS[task]] * 3
    write_json(tmp_path / "json" / folder / f"{folder}_train.json", records)
    (tmp_path / "lmdb" / folder).mkdir(parents=True)
    write_lmdb(tmp_path / "lmdb" / folder / f"{folder}_train.lmdb", records)
    for found in (read(task, tmp_path / "json"), read(task, tmp_path / "lmdb" / folder)):
        assert [one.number for one in found] == [0, 1, 2]
        assert [one.identifier for one in found] == (["a"] * 3 if task == "fluorescence" else ["0", "1", "2"])
        assert found[0].sequence == RECORDS[task]["primary"]
        assert len(found[0].residues) == len(found[0].sequence)
    first, second = read(task, tmp_path / "json")[0].label, read(task, tmp_path / "lmdb")[0].label
    assert first.dtype == second.dtype
    np.testing.assert_array_equal(first, second)


def test_labels_by_hand(tmp_path: Path) -> None:
    for task, record in RECORDS.items():
        write_json(tmp_path / task / "train.json", [record])
    assert read("fluorescence", tmp_path / "fluorescence")[0].label.tolist() == [3.5]
    assert read("remote_homology", tmp_path / "remote_homology")[0].label.tolist() == [1194]
    three = read("secondary_structure", tmp_path / "secondary_structure")[0].label
    assert three.tolist() == [[0, 1, 2, 2, -1], [1, 1, 1, 1, 1]]
    eight = read("secondary_structure", tmp_path / "secondary_structure", labels=LabelConfig(num_classes=8))
    assert eight[0].label[0].tolist() == [1, 4, 7, 0, 6]
    positions = read("contact_prediction", tmp_path / "contact_prediction")[0].label
    assert np.isnan(positions[2]).all()
    assert positions[3].tolist() == [3, 0, 0]


@pytest.mark.parametrize(
    ("task", "change", "clause"),
    [
        ("secondary_structure", {"ss3": [0, 1, 2]}, "record 1: has 3 values of 'ss3' for 5 residues"),
        ("secondary_structure", {"ss3": [0] * 9}, "record 1: has 9 values of 'ss3' for 5 residues"),
        ("secondary_structure", {"ss3": [0, 1, 2, 3, 0]}, "record 1: the class 3 of 'ss3' is outside 0 to 2"),
        ("secondary_structure", {"ss3": [0, 1, 2, 0.5, 0]}, "record 1: 'ss3' holds something else than whole"),
        ("secondary_structure", {"ss3": [[0, 1], [1], 0, 0, 0]}, "record 1: has 0 values of 'ss3' for 5 residues"),
        ("secondary_structure", {"valid_mask": [1, 0]}, "record 1: has 2 values of 'valid_mask' for 5 residues"),
        ("secondary_structure", {"primary": "MS7GE"}, "record 1: its sequence holds '7' at position 3"),
        ("secondary_structure", {"primary": ""}, "record 1: its sequence has no residues"),
        ("fluorescence", {"log_fluorescence": [float("nan")]}, "record 1: the label is nan, not a finite number"),
        ("fluorescence", {"log_fluorescence": [1.0, 2.0]}, "record 1: the label [1.0, 2.0] is not one number"),
        ("fluorescence", {"log_fluorescence": "bright"}, "record 1: the label 'bright' is no number"),
        ("fluorescence", {"log_fluorescence": None}, "record 1: has no label 'log_fluorescence', only 'primary'"),
        ("remote_homology", {"fold_label": 1195}, "record 1: the class 1195 is outside 0 to 1194"),
        ("remote_homology", {"fold_label": -1}, "record 1: the class -1 is outside 0 to 1194"),
        ("remote_homology", {"fold_label": 3.0}, "record 1: the label 3.0 is not one whole number"),
        ("contact_prediction", {"tertiary": [[0.0, 0, 0]]}, "record 1: has 1 positions and 4 marks"),
        ("contact_prediction", {"tertiary": "x"}, "record 1: its 'tertiary' is no table"),
        ("contact_prediction", {"tertiary": [[float("nan")] * 3] * 4}, "record 1: a valid residue's position is not"),
    ],
)
def test_a_bad_record_is_one_sentence_with_its_number(
    task: str, change: dict[str, Any], clause: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "train.json", [RECORDS[task], RECORDS[task] | change, RECORDS[task]])
    text = refused(task, tmp_path)
    assert f"train.json, {clause}" in text
    assert "correct or remove it" in text


class _Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, ("touch harmed",)


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "train.lmdb", [RECORDS["stability"], {"primary": _Harmful()}], as_arrays=False)
    text = refused("stability", tmp_path)
    assert "record 1: the record is damaged or not what it should be (it asks for posix.system)" in text
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "train.lmdb").write_bytes(b"not an LMDB at all, whatever it is called")
    assert "train.lmdb" in refused("stability", tmp_path)
    (tmp_path / "train.lmdb").unlink()
    (tmp_path / "train.json").write_text('[{"primary": "MKT"')
    assert "truncated" in refused("stability", tmp_path)
    write_json(tmp_path / "train.json", [])
    assert "holds no protein of the split 'train'" in refused("stability", tmp_path)
    (tmp_path / "train.json").write_text(">a\nMKT\n")
    assert "sequences without labels" in refused("stability", tmp_path)


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    write_json(tmp_path / "stability" / "stability_train.json", [RECORDS["stability"]])
    write_json(tmp_path / "stability" / "stability_test.json", [RECORDS["stability"]])
    text = refused("stability", tmp_path, name="tset")
    assert "holds no split 'tset'" in text
    assert "there are: test, train." in text
    assert "neither a folder nor a file" in refused("stability", tmp_path / "absent")


FLIP = "sequence,target,set,validation\nMKTA,1.5,train,False\nMKTC,2.5,train,True\nMKTD,3.5,test,\nMKTE,0.5,train,\n"


def test_a_table_as_flip_has_it_holds_three_splits(tmp_path: Path) -> None:
    path = tmp_path / "flip.csv"
    path.write_text(FLIP)
    found = {name: [one.sequence for one in read("sequence_regression", path, name)]
             for name in ("train", "valid", "test")}  # fmt: skip
    assert found == {"train": ["MKTA", "MKTE"], "valid": ["MKTC"], "test": ["MKTD"]}
    path.write_text(FLIP.replace("3.5", "nan"))
    assert "flip.csv, record 2: the label is nan" in refused("sequence_regression", path, name="test")


def test_tables_of_all_formats_and_named_columns(tmp_path: Path) -> None:
    columns = {"seq": ["MKTA", "MKTC"], "growth": [1.5, -2.0], "name": ["one", "two"]}
    labels = LabelConfig(sequence="seq", target="growth", identifier="name")
    for folder in ("csv", "tsv", "parquet"):
        (tmp_path / folder).mkdir()
    parquet.write_table(pa.table(columns), tmp_path / "parquet" / "train.parquet")
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        rows = [columns, *zip(*columns.values(), strict=True)]
        lines = [separator.join(map(str, row)) for row in rows]
        (tmp_path / suffix / f"train.{suffix}").write_text("\n".join(lines) + "\n")
    for suffix in ("csv", "tsv", "parquet"):
        found = read("sequence_regression", tmp_path / suffix, labels=labels)
        assert [(one.identifier, one.sequence, *one.label.tolist()) for one in found] == [
            ("one", "MKTA", 1.5),
            ("two", "MKTC", -2.0),
        ]
        assert "growth" in refused("sequence_regression", tmp_path / suffix, LabelConfig(sequence="seq", target="x"))
        assert "no column 'sequence'" in refused("sequence_regression", tmp_path / suffix)


def test_classes_of_a_table_are_those_of_its_training_split(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sequence,target,set\nMKT,nucleus,train\nMKA,membrane,train\nMKC,wall,valid\n")
    task = open_task("sequence_classification", LabelConfig())
    from megaprot.finetune.config import HeadConfig

    def examples(name: str) -> list[Example]:
        return read_examples(find_split(tmp_path / "t.csv", task.folder, name), task.labels, ESM, task.label_of)

    task.learn(examples("train"), HeadConfig())
    assert task.state() == {"classes": ["membrane", "nucleus"]}
    task.check(examples("train"), "t.csv")
    with pytest.raises(InputError, match=r"t.csv, record 2: the training split has no class 'wall'"):
        task.check(examples("valid"), "t.csv")
    with pytest.raises(InputError, match="has 1 class in column 'target'"):
        task.learn(examples("train")[:1], HeadConfig())


def test_residue_labels_of_a_table_are_letters(tmp_path: Path) -> None:
    from megaprot.finetune.config import HeadConfig

    (tmp_path / "train.csv").write_text("sequence,target\nMKT,.ab\nMK,ba\n")
    task = open_task("token_classification", LabelConfig())
    examples = read("token_classification", tmp_path)
    task.learn(examples, HeadConfig())
    assert [task.labels_of(one).tolist() for one in examples] == [[-1, 0, 1], [1, 0]]
    assert [task.weight(one) for one in examples] == [2, 2]
    (tmp_path / "valid.csv").write_text("sequence,target\nMKT,.ac\n")
    with pytest.raises(InputError, match=r"record 0: the training split has no class 'c'"):
        task.check(read("token_classification", tmp_path, "valid"), "valid.csv")
    (tmp_path / "valid.csv").write_text("sequence,target\nMKT,ab\n")
    assert "record 0: has 2 letters in 'target' for 3 residues" in refused(
        "token_classification", tmp_path, name="valid"
    )


def test_sequences_to_predict_need_no_labels(tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text(">one first\nMKT\n>two\nacd\n")
    found = list(read_unlabelled(tmp_path / "x.fasta", ESM, Columns()))
    assert [(one.identifier, one.sequence, one.label.size) for one in found] == [("one", "MKT", 0), ("two", "acd", 0)]
    (tmp_path / "x.fasta").write_text(">one\nMKT\n>two\nM1T\n")
    with pytest.raises(InputError, match=r"x.fasta:3: two holds '1' at position 2"):
        list(read_unlabelled(tmp_path / "x.fasta", ESM, Columns()))
    (tmp_path / "x.fasta").write_text(">one\n\n>two\nMKT\n")
    with pytest.raises(InputError, match=r"x.fasta:1: record 'one' has no sequence; correct or remove it"):
        list(read_unlabelled(tmp_path / "x.fasta", ESM, Columns()))
