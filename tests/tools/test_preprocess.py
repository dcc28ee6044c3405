"""`megaprot preprocess` from files to corpora: the content, the splits, and what is left behind when it goes wrong."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from megaprot.common.errors import InputError, RunError
from megaprot.common.sequence_readers import read_fasta
from megaprot.pretrain.corpus import Corpus, CorpusWriter
from megaprot.tools.preprocess import PreprocessConfig, SplitConfig, Splitter, run

EXAMPLES = Path(__file__).parents[2] / "examples" / "pfam"
CUT = EXAMPLES / "Pfam-A.cut.fasta.gz"
CLANS = EXAMPLES / "Pfam-A.clans.cut.tsv"


def texts(corpus: Corpus) -> list[str]:
    """Return the sequences of a corpus as letters."""
    tokens = corpus.vocabulary.tokens
    return ["".join(tokens[i] for i in corpus.sequence(index)) for index in range(corpus.num_sequences)]


def made_sequences(num_sequences: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices("ACDEFGHIKLMNPQRSTVWY", k=choose.randint(5, 40))) for _ in range(num_sequences)]


def write_fasta(path: Path, sequences: list[str]) -> str:
    path.write_text("".join(f">s{index}\n{text}\n" for index, text in enumerate(sequences)))
    return str(path)


def preprocess(inputs: list[str], output: Path, on_bad_record: str = "stop", **split: object) -> dict[str, Corpus]:
    """Run and return the corpora by split."""
    assert on_bad_record in ("stop", "skip")
    settings = SplitConfig(**split)  # type: ignore[arg-type]
    run(PreprocessConfig(input=inputs, output=str(output), split=settings, on_bad_record=on_bad_record))  # type: ignore[arg-type]
    return {path.stem: Corpus.open(path.with_suffix("")) for path in output.glob("*.json")}


def test_every_domain_of_the_shipped_cut_lands_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = preprocess([str(CUT)], tmp_path / "out", valid=0.05, test=0.1)
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
    assert gzip.decompress((tmp_path / CUT.name).read_bytes()) == gzip.decompress(CUT.read_bytes())
    assert (tmp_path / CLANS.name).read_bytes() == CLANS.read_bytes()


def families_by_split(corpora: dict[str, Corpus]) -> dict[str, dict[str, int]]:
    return {name: corpus.manifest["families"] for name, corpus in corpora.items()}


def test_a_family_lies_in_one_split(tmp_path: Path) -> None:
    corpora = preprocess([str(CUT)], tmp_path / "out", by="family", valid=0.1, test=0.1)
    families = families_by_split(corpora)
    expected: dict[str, int] = defaultdict(int)
    for record in read_fasta(CUT):
        expected[record.family] += 1
    assert {**families["train"], **families["valid"], **families["test"]} == expected
    assert sum(map(len, families.values())) == len(expected)


def test_a_clan_lies_in_one_split(tmp_path: Path) -> None:
    corpora = preprocess([str(CUT)], tmp_path / "out", by="clan", clans=str(CLANS), valid=0.2, test=0.1)
    splits_of_clan = defaultdict(set)
    table = dict(line.split("\t")[:2] for line in CLANS.read_text().splitlines())
    for name, families in families_by_split(corpora).items():
        for family in families:
            splits_of_clan[table[family] or family].add(name)
    assert {len(splits) for splits in splits_of_clan.values()} == {1}
    assert len(splits_of_clan) < len(table)
    assert corpora["train"].manifest["split"] == {
        "name": "train", "by": "clan", "valid": 0.2, "test": 0.1, "seed": 1234,
        "clans": str(CLANS), "clans_sha256": hashlib.sha256(CLANS.read_bytes()).hexdigest(),
    }  # fmt: skip


def test_a_compressed_clans_table_gives_the_same_split(tmp_path: Path) -> None:
    (tmp_path / "clans.tsv.gz").write_bytes(gzip.compress(CLANS.read_bytes()))
    plain, packed = (
        Splitter(SplitConfig(by="clan", clans=str(path))).clan_of_family for path in (CLANS, tmp_path / "clans.tsv.gz")
    )
    assert plain == packed != {}


def test_families_missing_from_the_clans_table_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "clans.tsv"
    table.write_text("".join(CLANS.read_text().splitlines(keepends=True)[:-2]))
    preprocess([str(CUT)], tmp_path / "out", by="clan", clans=str(table), valid=0.2)
    assert "families not in the clans table, each taken as its own clan: 2" in capsys.readouterr().out


def test_the_split_depends_on_the_sequence_and_the_seed_alone(tmp_path: Path) -> None:
    sequences = made_sequences(400)
    first = preprocess([write_fasta(tmp_path / "a.fasta", sequences)], tmp_path / "a", valid=0.3)
    others = [*reversed(sequences), *sequences[::3], *made_sequences(100, seed=1)]
    inputs = [
        write_fasta(tmp_path / "b.fasta", [text.lower() for text in others[:250]]),
        write_fasta(tmp_path / "c.fasta", others[250:]),
    ]
    second = preprocess(inputs, tmp_path / "b", valid=0.3)
    reseeded = preprocess([write_fasta(tmp_path / "d.fasta", sequences)], tmp_path / "d", valid=0.3, seed=7)
    assert set(texts(second["valid"])) >= set(texts(first["valid"]))
    assert not set(texts(second["valid"])) & set(texts(second["train"]))
    assert set(texts(reseeded["valid"])) != set(texts(first["valid"]))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    inputs = [write_fasta(tmp_path / "a.fasta", made_sequences(50))]
    for name in ("one", "two"):
        preprocess(inputs, tmp_path / name, valid=0.3)
    for suffix in ("bin", "idx", "json"):
        first, second = (tmp_path / name / f"train.{suffix}" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_changed_letters_are_counted_in_the_manifest_and_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.fasta").write_text(">a\nacJJ\n>b\nMKT*\n")
    corpora = preprocess([str(tmp_path / "a.fasta")], tmp_path / "out", valid=0.0)
    assert list(corpora) == ["train"]
    assert texts(corpora["train"]) == ["ACXX", "MKT"]
    assert corpora["train"].manifest["changes"] == {"dropped_*": 1, "replaced_J": 2, "upper_cased": 2}
    assert "changed: dropped_* 1, replaced_J 2, upper_cased 2" in capsys.readouterr().out


BAD = ">a\nMKT\n>b\nMK7\n>c\n--\n>d\n>e\nACD\n"


def test_a_bad_record_stops_and_leaves_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "bad.fasta"
    path.write_text(BAD)
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
    corpora = preprocess([str(path)], tmp_path / "out", on_bad_record="skip", valid=0.0)
    assert texts(corpora["train"]) == ["MKT", "ACD"]
    printed = capsys.readouterr()
    assert "skipped: 13 bad records" in printed.out
    assert printed.err.count("skipped: ") == 5
    assert f"{path}:5: record 'c' has no residues" in printed.err
    assert corpora["train"].manifest["sources"][0]["num_skipped"] == 13


def test_families_are_needed_by_family_splits_only(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fasta", made_sequences(5))
    with pytest.raises(InputError, match=r"a\.fasta:1: record 's0' names no Pfam family, which split\.by family needs"):
        preprocess([path], tmp_path / "out", by="family")
    with pytest.raises(InputError, match="no input file holds a sequence that can be used"):
        preprocess([path], tmp_path / "out", on_bad_record="skip", by="family")


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"valid": 0.6, "test": 0.4}, "leave nothing to train on"),
        ({"valid": -0.1}, "leave nothing to train on"),
        ({"by": "clan"}, "need each other"),
        ({"by": "family", "clans": "x.tsv"}, "need each other"),
        ({"by": "clan", "clans": "x.tsv"}, r"x\.tsv: cannot be read"),
        ({"by": "clan", "clans": __file__}, r"test_preprocess\.py:1: is not 'family<TAB>clan"),
        ({"valid": 1e-9}, r"split 'valid' got no sequence from so few sequences: raise split\.valid or change"),
        ({"valid": 0.5, "test": 1e-9}, r"split 'test' got no sequence.*: raise split\.test"),
        ({"valid": 0.999999}, r"split 'train' got no sequence.*: lower split\.valid and split\.test"),
    ],
)
def test_wrong_split_settings_are_answered_with_a_remedy(tmp_path: Path, split: dict[str, object], said: str) -> None:
    path = write_fasta(tmp_path / "a.fasta", made_sequences(20))
    with pytest.raises(InputError, match=said):
        preprocess([path], tmp_path / "out", **split)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["a.fasta"]


def test_wrong_input_and_output_are_named(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fasta", made_sequences(20))
    with pytest.raises(InputError, match="input names no file"):
        preprocess([], tmp_path / "out")
    with pytest.raises(InputError, match=r"b\.fasta: is missing"):
        preprocess([path, str(tmp_path / "b.fasta")], tmp_path / "out")
    with pytest.raises(InputError, match=r"a\.fasta: is named 2 times in input"):
        preprocess([path, str(tmp_path / "." / "a.fasta")], tmp_path / "out")
    with pytest.raises(InputError, match="already has content"):
        preprocess([path], tmp_path)
    with pytest.raises(InputError, match="unknown vocabulary 'esm3'"):
        run(PreprocessConfig(input=[path], output=str(tmp_path / "out"), vocabulary="esm3"))
    assert os.listdir(tmp_path) == ["a.fasta"]


def test_a_full_disk_fails_the_run_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CorpusWriter, "_flush", no_room)
    path = write_fasta(tmp_path / "a.fasta", made_sequences(20))
    with pytest.raises(RunError, match="out: could not be written \\(No space left on device\\)"):
        preprocess([path], tmp_path / "out", valid=0.4)
    assert os.listdir(tmp_path) == ["a.fasta"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out"
    program = (
        "import sys; from megaprot.tools.preprocess import *\n"
        "run(PreprocessConfig(input=['-'], output=sys.argv[1], split=SplitConfig(valid=0.4)))"
    )
    command = [sys.executable, "-c", program, str(output)]
    content = "".join(f">s{index}\n{text}\n" for index, text in enumerate(made_sequences(40))).encode()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(content)
        process.stdin.flush()
        while not list(tmp_path.glob(".out.partial-*/train.bin")):  # it waits for the rest of its input
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(number)
        process.wait()
    assert not output.exists()
    again = subprocess.run(command, input=content, capture_output=True, check=True)
    assert b"written to" in again.stdout
    assert b"\r" not in again.stderr  # no progress bar where there is no terminal
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(output)) == [
        f"{name}.{suffix}" for name in ("train", "valid") for suffix in ("bin", "idx", "json")
    ]
    assert json.loads((output / "train.json").read_text())["sources"][0]["path"] == "-"
