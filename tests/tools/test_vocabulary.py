"""`megaprot vocabulary` from files to a model, and what it says to wrong input."""

import gzip
from pathlib import Path

import pytest

from megaprot.common.sentencepiece_model import RESIDUE_LETTERS, SMALLEST_SIZE
from megaprot.common.vocabulary import get_vocabulary
from megaprot.tools import cli

CUT = Path(__file__).parents[2] / "examples" / "pfam" / "Pfam-A.cut.fasta.gz"


def vocabulary(*arguments: object) -> int:
    return cli.main(["vocabulary", *map(str, arguments)])


def test_a_model_is_trained_on_a_sample_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pfam.model"
    assert vocabulary("--input", CUT, "--output", output, "--size", 200, "--num_sequences", 300) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{output}: 200 tokens from 300 of 12,067 sequences, 1.")
    assert get_vocabulary(str(output)).size == 200
    assert list(tmp_path.iterdir()) == [output]


def test_the_seed_draws_the_sample(tmp_path: Path) -> None:
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / f"{name}.model"
        given = ("--input", CUT, "--output", output, "--size", 200, "--num_sequences", 100, "--seed", seed)
        assert vocabulary(*given) == 0
        models.append(output.read_bytes())
    assert models[0] == models[1] != models[2]


def test_sequences_go_through_the_letter_policy(tmp_path: Path) -> None:
    clean, marked = "MKTAYIAKQR" * 30, "*mktayiAKQR " + "MKTAYIAKQR" * 29 + "-"
    models = []
    for name, text in (("clean", clean), ("marked", marked)):
        (tmp_path / f"{name}.fasta").write_text(f">a\n{text}\n")
        output = tmp_path / f"{name}.model"
        assert vocabulary("--input", tmp_path / f"{name}.fasta", "--output", output, "--size", 40) == 0
        models.append(output.read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("letters", ["ACDEFGHIKLMNPQRSTVWY", "AC"])
def test_letters_that_no_sequence_has_are_tokens_too(tmp_path: Path, letters: str) -> None:
    (tmp_path / "a.fasta").write_text(">a\n" + letters * 40 + "\n")
    given = ("--input", tmp_path / "a.fasta", "--output", tmp_path / "a.model", "--size", SMALLEST_SIZE)
    assert vocabulary(*given) == 0
    trained = get_vocabulary(str(tmp_path / "a.model"))
    assert set(RESIDUE_LETTERS) <= set(trained.tokens)
    ids, changes = trained.encode(b"BOUZX")
    assert "".join(trained.tokens[index] for index in ids) == "BOUZX"
    assert not changes


def test_bad_records_stop_or_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = gzip.decompress(CUT.read_bytes())[:60_000].decode().rpartition(">")[0] + ">bad\nMK7\n"
    (tmp_path / "a.fasta").write_text(text)
    given = ("--input", tmp_path / "a.fasta", "--output", tmp_path / "a.model", "--size", 60)
    assert vocabulary(*given) == 2
    assert "record 'bad' holds '7' at position 3" in capsys.readouterr().err
    assert not (tmp_path / "a.model").exists()
    (tmp_path / "a.fasta").write_text(text + ">none\n")
    assert vocabulary(*given, "--on_bad_record", "skip") == 0
    printed = capsys.readouterr()
    assert "; skipped: 2 bad records" in printed.out
    assert printed.err.count("skipped: ") == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--output": "OUT/pfam.txt"}, "give a name that ends with .model"),
        ({"--output": "OUT/there.model"}, "there.model: exists already"),
        ({"--output": "OUT/none/pfam.model"}, "its folder does not exist"),
        ({"--size": "30"}, "size is 30: give a number from 31 to 65536"),
        ({"--size": "70000"}, "size is 70000: give a number from 31 to 65536"),
        ({"--num_sequences": "0"}, "num_sequences is 0"),
        ({"--input": "OUT/none.fasta"}, "none.fasta"),
        ({"--input": "OUT/empty.fasta"}, "empty.fasta"),
        ({"--input": "OUT/small.fasta", "--size": "9999"}, "9999 pieces cannot be trained from these sequences"),
        ({"--input": "OUT/unusable.fasta", "--on_bad_record": "skip"}, "no input file holds a sequence"),
    ],
)
def test_wrong_settings_and_input_are_one_sentence(
    changed: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.model").write_bytes(b"")
    (tmp_path / "empty.fasta").write_bytes(b"")
    (tmp_path / "small.fasta").write_text(">a\nACD\n")
    (tmp_path / "unusable.fasta").write_text(">a\n---\n")
    settings = {"--input": str(CUT), "--output": "OUT/pfam.model", "--size": "100"} | changed
    given = [part.replace("OUT", str(tmp_path)) for pair in settings.items() for part in pair]
    before = sorted(tmp_path.iterdir())
    assert vocabulary(*given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.splitlines()[-1].startswith("megaprot vocabulary: error: ")
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before
