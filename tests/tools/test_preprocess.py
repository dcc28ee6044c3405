"""`megaprot preprocess` from files to corpora: the content, the messages, and what is left when it goes wrong."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaprot.common import sentencepiece_model
from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import read_fasta
from megaprot.tools.preprocess import PreprocessConfig, run
from megaprot.tools.preprocessing import parts
from tests.tools.preprocess_runs import CLANS, CUT, EXAMPLES, contents, made_sequences, preprocess, texts, write_fasta

PROGRAM = [sys.executable, "-m", "megaprot.tools.cli", "preprocess"]


def test_every_domain_of_the_shipped_cut_lands_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = preprocess([str(CUT)], tmp_path / "out", split={"valid": 0.05, "test": 0.1})
    printed = capsys.readouterr().out
    expected = [record.sequence.decode() for record in read_fasta(CUT)]
    assert len(expected) >= 10_000
    found = {name: texts(corpus) for name, corpus in corpora.items()}
    assert sorted(found["train"] + found["valid"] + found["test"]) == sorted(expected)
    assert not set(found["train"]) & set(found["valid"])
    assert not set(found["test"]) & set(found["train"] + found["valid"])
    assert len(found["valid"]) == pytest.approx(0.05 * len(expected), rel=0.2)
    assert len(found["test"]) == pytest.approx(0.1 * len(expected), rel=0.2)
    for name, corpus in corpora.items():
        corpus.verify()
        assert f"{name}: {corpus.num_sequences:,} sequences, {corpus.num_residues:,} residues" in printed
    (source,) = corpora["train"].manifest["sources"]
    assert source["sha256"] == hashlib.sha256(CUT.read_bytes()).hexdigest()
    assert (source["num_sequences"], source["num_bytes"]) == (len(expected), CUT.stat().st_size)


def test_cutting_the_shipped_cut_again_changes_nothing(tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "make_cut.py"), str(CUT), str(CLANS), str(tmp_path)]
    subprocess.run(program, check=True, capture_output=True)
    assert [*read_fasta(tmp_path / CUT.name)] == [*read_fasta(CUT)]
    assert (tmp_path / CLANS.name).read_bytes() == CLANS.read_bytes()


def test_changed_letters_are_counted_in_the_manifest_and_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.fasta").write_text(">a\nacJJ\n>b\nMKT*\n")
    corpora = preprocess([str(tmp_path / "a.fasta")], tmp_path / "out", split={"valid": 0.0})
    assert list(corpora) == ["train"]
    assert texts(corpora["train"]) == ["ACXX", "MKT"]
    assert corpora["train"].manifest["changes"] == {"dropped_*": 1, "replaced_J": 2, "upper_cased": 2}
    assert "changed: dropped_* 1, replaced_J 2, upper_cased 2" in capsys.readouterr().out


def test_the_sequences_stand_in_the_order_of_the_input_whatever_the_size_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = made_sequences(300)
    inputs = [
        write_fasta(tmp_path / "a.fasta", sequences[:100], families=[number // 7 for number in range(100)]),
        write_fasta(tmp_path / "b.fasta", sequences[100:]),
    ]
    whole = preprocess(inputs, tmp_path / "whole", split={"valid": 0.3})
    for name, corpus in whole.items():
        found = texts(corpus)
        assert found == [text for text in sequences if text in set(found)], name
        first, second = corpus.manifest["sources"]
        assert (first["num_sequences"], second["num_sequences"]) == (100, 200)
        assert sum(corpus.manifest["families"].values()) == len(set(found) & set(sequences[:100]))
    monkeypatch.setattr(parts, "BLOCK_RECORDS", 7)
    monkeypatch.setattr(parts, "BLOCK_IDS", 100)
    preprocess(inputs, tmp_path / "small", split={"valid": 0.3})
    assert contents(tmp_path / "whole") == contents(tmp_path / "small")


BAD = ">a\nMKT\n>b\nMK7\n>c\n--\n>d\n>e\nACD\n"


def test_a_bad_record_stops_and_leaves_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "bad.fasta"
    path.write_text(BAD.replace(">d\n", ""))
    with pytest.raises(InputError) as caught:
        preprocess([str(path)], tmp_path / "out")
    assert str(caught.value) == (
        f"{path}:3: record 'b' holds '7' at position 3: correct it, or skip such records with --on_bad_record skip."
    )
    assert os.listdir(tmp_path) == ["bad.fasta"]


def test_skipped_records_are_counted_and_the_first_few_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.fasta"
    path.write_text(BAD + ">x\n1\n" * 10)
    corpora = preprocess([str(path)], tmp_path / "out", on_bad_record="skip", split={"valid": 0.0})
    assert texts(corpora["train"]) == ["MKT", "ACD"]
    printed = capsys.readouterr()
    assert "skipped: 13 bad records" in printed.out
    assert printed.err.count("skipped: ") == 5
    assert f"{path}:5: record 'c' has no residues" in printed.err
    assert corpora["train"].manifest["sources"][0]["num_skipped"] == 13


def test_families_are_needed_by_family_splits_only(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fasta", made_sequences(5))
    with pytest.raises(InputError, match=r"a\.fasta:1: record 's0' names no Pfam family, which split\.by family needs"):
        preprocess([path], tmp_path / "out", split={"by": "family"})
    with pytest.raises(InputError, match="no input file holds a sequence that can be used"):
        preprocess([path], tmp_path / "out", on_bad_record="skip", split={"by": "family"})


def test_wrong_input_and_output_are_named(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fasta", made_sequences(20))
    with pytest.raises(InputError, match="input names no file"):
        preprocess([], tmp_path / "out")
    with pytest.raises(InputError, match=r"b\.fasta: is missing"):
        preprocess([path, str(tmp_path / "b.fasta")], tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: is a pipe, which can be read only once: give --format too"):
        preprocess([str(tmp_path / "pipe")], tmp_path / "out")
    (tmp_path / "pipe").unlink()
    with pytest.raises(InputError, match=r"a\.fasta: is named 2 times in input"):
        preprocess([path, str(tmp_path / "." / "a.fasta")], tmp_path / "out")
    with pytest.raises(InputError, match="already has content"):
        preprocess([path], tmp_path)
    with pytest.raises(InputError, match="unknown vocabulary 'esm3'"):
        run(PreprocessConfig(input=[path], output=str(tmp_path / "out"), vocabulary="esm3"))
    assert os.listdir(tmp_path) == ["a.fasta"]


def limited_files(num_bytes: int) -> Any:
    """Return what lets a process write no file longer than that: to it, a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_fails_the_run_in_one_sentence_and_leaves_no_folder(tmp_path: Path, workers: str) -> None:
    plain = tmp_path / "a.fasta"
    plain.write_text("".join(f">{record.identifier}\n{record.sequence.decode()}\n" for record in read_fasta(CUT)))
    output = tmp_path / "out"
    command = [*PROGRAM, "--input", str(plain), str(CUT), "--output", str(output), "--workers", workers]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited_files(1_500_000))
    assert ended.returncode == 1
    assert ended.stderr == (
        f"megaprot preprocess: error: {output}: could not be read or written (File too large): "
        "make room or choose another folder.\n"
    )
    assert os.listdir(tmp_path) == ["a.fasta"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out"
    command = [*PROGRAM, "--input", "-", "--output", str(output), "--split.valid", "0.4"]
    content = "".join(f">s{index}\n{text}\n" for index, text in enumerate(made_sequences(40))).encode()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(content)
        process.stdin.flush()
        while not list(tmp_path.glob(".out.partial-*/work/part-000000")):  # it waits for the rest of its input
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(number)
        process.wait()
    assert os.listdir(tmp_path) == [] or number == signal.SIGKILL
    again = subprocess.run(command, input=content, capture_output=True, check=True)
    assert b"written to" in again.stdout
    assert b"\r" not in again.stderr  # no progress bar where there is no terminal
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(output)) == [
        f"{name}.{suffix}" for name in ("train", "valid") for suffix in ("bin", "idx", "json")
    ]
    assert json.loads((output / "train.json").read_text())["sources"][0]["path"] == "-"


def test_a_sentencepiece_vocabulary_gives_its_pieces(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    records = [record.sequence.decode() for record in read_fasta(CUT)][:1000]
    (tmp_path / "pfam.model").write_bytes(
        sentencepiece_model.train([*records, sentencepiece_model.RESIDUE_LETTERS], 300)
    )
    values: dict[str, Any] = {"vocabulary": str(tmp_path / "pfam.model"), "split": {"valid": 0.0}, "deduplicate": True}
    path = write_fasta(tmp_path / "a.fasta", records)
    (corpus,) = preprocess([path], tmp_path / "out", **values).values()
    processor = library.SentencePieceProcessor(model_file=str(tmp_path / "pfam.model"))
    unique = [*dict.fromkeys(records)]
    assert corpus.num_sequences == len(unique)
    assert [corpus.sequence(index).tolist() for index in range(len(unique))] == processor.encode(unique)
    assert corpus.dtype == np.uint16
    assert corpus.num_residues < 0.9 * sum(map(len, unique))  # in tokens
    (tmp_path / "test.fasta").write_text(f">t\n{unique[5].lower()}\n")  # compared by residues
    values["exclude"] = {"files": [str(tmp_path / "test.fasta")], "identity": 1.0}
    (corpus,) = preprocess([path], tmp_path / "excluded", **values).values()
    left = [text for text in unique if text not in unique[5] and unique[5] not in text]
    assert [corpus.sequence(index).tolist() for index in range(len(left))] == processor.encode(left)


def test_a_part_without_sequences_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "bad.fasta").write_text(">a\n7\n")
    inputs = [str(tmp_path / "bad.fasta"), write_fasta(tmp_path / "a.fasta", ["MKT"])]
    corpora = preprocess(inputs, tmp_path / "out", on_bad_record="skip", deduplicate=True, split={"valid": 0.0})
    assert texts(corpora["train"]) == ["MKT"]
    assert [source["num_sequences"] for source in corpora["train"].manifest["sources"]] == [0, 1]


def test_memory_grows_by_less_than_the_sequences(tmp_path: Path) -> None:
    """A part of 200,000 made sequences is merged with far less memory than its 40 MB."""
    import tracemalloc

    rows = np.random.default_rng(1).integers(65, 90, size=(200_000, 200), dtype=np.uint8)
    rows[(rows == ord("B")) | (rows == ord("J")) | (rows == ord("O")) | (rows == ord("U"))] = ord("A")
    path = tmp_path / "a.fasta"
    path.write_bytes(b"".join(b">%d\n%b\n" % (number, row.tobytes()) for number, row in enumerate(rows)))
    tracemalloc.start()
    preprocess([str(path)], tmp_path / "out", deduplicate=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
