"""Corpora that begin with old ones, and looking at corpora: `--append`, `--inspect`, `--verify`."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaprot.common.errors import InputError
from megaprot.tools.preprocess import PreprocessConfig, run
from tests.tools.preprocess_runs import CUT, contents, made_sequences, opened, preprocess, settings, texts, write_fasta

SPLIT = {"valid": 0.3}


@pytest.mark.parametrize("deduplicate", [False, True])
def test_appending_gives_what_all_input_at_once_gives(tmp_path: Path, deduplicate: bool) -> None:
    sequences = made_sequences(200)
    families = [number % 11 for number in range(130)]
    first = write_fasta(tmp_path / "a.fasta", sequences[:130], families)
    second = write_fasta(tmp_path / "b.fasta", [*sequences[100:], *sequences[190:]])
    values: dict[str, Any] = {"deduplicate": deduplicate, "split": SPLIT}
    preprocess([first], tmp_path / "old", **values)
    before = contents(tmp_path / "old")
    appended = preprocess([second], tmp_path / "new", append=str(tmp_path / "old"), **values)
    preprocess([first, second], tmp_path / "whole", **values)
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")
    assert contents(tmp_path / "old") == before
    for name, corpus in opened(tmp_path / "old").items():
        assert texts(appended[name])[: corpus.num_sequences] == texts(corpus)


def test_what_old_corpora_were_made_with_must_be_asked_for_again(tmp_path: Path) -> None:
    first = write_fasta(tmp_path / "a.fasta", made_sequences(60))
    second = write_fasta(tmp_path / "b.fasta", made_sequences(60, seed=2))
    table = tmp_path / "clusters.tsv"
    table.write_text("s1\ts2\n")
    preprocess([first], tmp_path / "old", split=SPLIT)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split": {**SPLIT, "seed": 3}}, r"train: was made with another split\.seed"),
        (
            {"split": {**SPLIT, "test": 0.1}},
            "holds the splits train, valid, but the settings ask for test, train, valid",
        ),
        ({"split": SPLIT, "vocabulary": "iupac"}, "train: has the vocabulary esm, not the iupac given"),
        ({"split": SPLIT, "exclude": {"files": [first]}}, r"train: was made with another exclude\.files"),
        ({"split": {**SPLIT, "clusters": str(table)}}, r"append and split\.clusters exclude each other"),
    ]
    for values, said in cases:
        with pytest.raises(InputError, match=said):
            preprocess([second], tmp_path / "new", append=str(tmp_path / "old"), **values)
    with pytest.raises(InputError, match=r"a\.fasta: holds no corpora"):
        preprocess([second], tmp_path / "new", append=first, split=SPLIT)
    content = bytearray((tmp_path / "old" / "valid.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "old" / "valid.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"valid\.bin: its content was altered"):
        preprocess([second], tmp_path / "new", append=str(tmp_path / "old"), split=SPLIT)
    assert not (tmp_path / "new").exists()


def test_inspect_prints_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a PF00007.1;\n" + "A" * 10 + "\n>b PF00007.2;\n" + "C" * 70 + "\n>c PF00003.1;\nMk\n>d\nA7\n")
    preprocess([str(path)], tmp_path / "out", on_bad_record="skip", split={"valid": 0.0})
    capsys.readouterr()
    run(PreprocessConfig(inspect=str(tmp_path / "out")))
    assert capsys.readouterr().out.splitlines() == [
        "train: 3 sequences, 82 residues, lengths 2 to 70, mean 27.3",
        "       0 to 31     residues             2 " + "#" * 40,
        "      32 to 63     residues             0",
        "      64 to 127    residues             1 " + "#" * 20,
        "  families: 2; the largest: PF00007 2, PF00003 1",
        "",
        "vocabulary: esm, 33 tokens, 1 byte(s) each",
        f"source: {path}: 3 sequences, 1 skipped; {path.stat().st_size} bytes, "
        f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}",
        "changed: upper_cased 1",
        "splits: by random, valid 0.0, test 0.0, seed 1234",
        "exact duplicates: kept",
    ]


def test_verify_reads_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings([str(CUT)], tmp_path / "out", split={"valid": 0.1}))
    capsys.readouterr()
    run(PreprocessConfig(verify=str(tmp_path / "out")))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "out" / name) for name in ("train", "valid")]
    assert f"{sizes['train.bin'] + sizes['train.idx']:,} bytes read" in lines[0]
    (tmp_path / "out" / "train.bin").write_bytes(b"\5" * sizes["train.bin"])
    command = [sys.executable, "-m", "megaprot.tools.cli", "preprocess", "--verify", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"{tmp_path / 'out' / 'train.bin'}: its content was altered since it was written" in ended.stderr


def test_a_folder_without_corpora_is_named(tmp_path: Path) -> None:
    for config in (PreprocessConfig(inspect=str(tmp_path)), PreprocessConfig(verify=str(tmp_path))):
        with pytest.raises(InputError, match="holds no corpora"):
            run(config)
    with pytest.raises(InputError, match="x: is no folder"):
        run(PreprocessConfig(inspect=str(tmp_path / "x")))
    with pytest.raises(InputError, match="output names no folder"):
        run(PreprocessConfig(input=[str(CUT)]))
