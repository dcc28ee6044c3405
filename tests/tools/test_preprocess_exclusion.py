"""Sequences that must not enter: what is left out, what is reported, and what the manifest says."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import read_fasta
from megaprot.tools.preprocess import run
from megaprot.tools.preprocessing import exclusion, units
from megaprot.tools.preprocessing.exclusion import batches
from tests.tools.preprocess_runs import CUT, contents, preprocess, settings, texts, write_fasta

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def long_sequences(num_sequences: int, seed: int) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices(RESIDUES, k=choose.randint(60, 120))) for _ in range(num_sequences)]


def near(text: str, seed: int) -> str:
    """Return a stretch of a sequence with one residue replaced, at an identity of 98 % or so."""
    letters = list(text[5:-3])
    place = random.Random(seed).randrange(len(letters))
    letters[place] = "A" if letters[place] != "A" else "W"
    return "".join(letters)


def test_what_is_nearly_excluded_is_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forbidden, others = long_sequences(20, seed=1), long_sequences(80, seed=2)
    planted = [near(text, number) for number, text in enumerate(forbidden[:10])] + forbidden[10:]
    mixed = [*others, *planted]
    random.Random(3).shuffle(mixed)
    path = write_fasta(tmp_path / "a.fasta", mixed)
    (tmp_path / "test.fasta").write_text("".join(f">t{n} x\n{text.lower()}\n" for n, text in enumerate(forbidden)))
    values: dict[str, Any] = {"exclude": {"files": [str(tmp_path / "test.fasta")]}, "split": {"valid": 0.2}}
    corpora = preprocess([path], tmp_path / "out", **values)
    assert sorted([*texts(corpora["train"]), *texts(corpora["valid"])]) == sorted(others)
    header, *lines = (tmp_path / "out" / "excluded.tsv").read_text().splitlines()
    assert header == "identifier\tsource\texcluded_by\tidentity"
    found = {(name, source, by): float(identity) for name, source, by, identity in (line.split("\t") for line in lines)}
    assert [*found] == [
        (f"s{number}", path, f"t{planted.index(text)}") for number, text in enumerate(mixed) if text in planted
    ]
    for name, _, by in found:
        text = mixed[int(name[1:])]
        expected = 1.0 if text in forbidden else 1 - 1 / len(text)
        assert found[name, path, by] == pytest.approx(expected, abs=1e-4)
    for corpus in corpora.values():
        assert corpus.manifest["exclusion"] == {
            "files": [{
                "path": str(tmp_path / "test.fasta"), "num_bytes": (tmp_path / "test.fasta").stat().st_size,
                "sha256": hashlib.sha256((tmp_path / "test.fasta").read_bytes()).hexdigest(),
            }],
            "identity": 0.9, "method": "kmer", "num_removed": 20,
        }  # fmt: skip
        assert corpus.manifest["sources"][0]["num_excluded"] == 20
    assert f"excluded: 20 sequences, listed in {tmp_path / 'out'}/excluded.tsv" in capsys.readouterr().out
    for shard in ("0/2", "1/2"):
        run(settings([path], tmp_path / "shards", shard=shard, **values))
    run(settings([path], tmp_path / "shards", merge=True, **values))
    assert contents(tmp_path / "shards") == contents(tmp_path / "out")


def test_a_large_file_read_in_ranges_leaves_out_and_reports_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = long_sequences(40, seed=5)
    path = write_fasta(tmp_path / "a.fasta", sequences)
    test = write_fasta(tmp_path / "test.fasta", [near(sequences[3], 1), sequences[30]])
    values: dict[str, Any] = {"exclude": {"files": [test]}, "split": {"valid": 0.2}}
    preprocess([path], tmp_path / "whole", **values)
    monkeypatch.setattr(units, "UNIT_BYTES", 1_000)
    preprocess([path], tmp_path / "ranges", **values)
    assert contents(tmp_path / "ranges") == contents(tmp_path / "whole")
    assert len((tmp_path / "ranges" / "excluded.tsv").read_text().splitlines()) == 1 + 2


def test_appended_corpora_keep_the_report_of_the_old(tmp_path: Path) -> None:
    sequences = long_sequences(30, seed=4)
    first, second = write_fasta(tmp_path / "a.fasta", sequences[:20]), write_fasta(tmp_path / "b.fasta", sequences[15:])
    test = write_fasta(tmp_path / "test.fasta", sequences[14:18])
    values: dict[str, Any] = {"exclude": {"files": [test]}, "split": {"valid": 0.2}}
    preprocess([first], tmp_path / "old", **values)
    preprocess([second], tmp_path / "new", append=str(tmp_path / "old"), **values)
    preprocess([first, second], tmp_path / "whole", **values)
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")
    assert len((tmp_path / "new" / "excluded.tsv").read_text().splitlines()) == 1 + 4 + 3


def test_what_cannot_be_excluded_is_refused(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fasta", long_sequences(5, seed=5))
    (tmp_path / "bad.fasta").write_text(">t\nMK7\n")
    with pytest.raises(InputError, match=r"bad\.fasta:1: record 't' holds '7' at position 3: correct it"):
        preprocess([path], tmp_path / "out", exclude={"files": [str(tmp_path / "bad.fasta")]})
    (tmp_path / "bad.fasta").write_text(">t\n>u\nMKT\n")
    with pytest.raises(InputError, match=r"bad\.fasta:1: record 't' has no sequence: correct it, since it could not"):
        preprocess([path], tmp_path / "out", exclude={"files": [str(tmp_path / "bad.fasta")]}, on_bad_record="skip")
    with pytest.raises(InputError, match="all were skipped, excluded or duplicates"):
        preprocess([path], tmp_path / "out", exclude={"files": [path]})
    with pytest.raises(InputError, match=r"exclude\.identity is 0\.2"):
        preprocess([path], tmp_path / "out", exclude={"files": [path], "identity": 0.2})
    with pytest.raises(InputError, match=r"c\.fasta: is missing"):
        preprocess([path], tmp_path / "out", exclude={"files": [str(tmp_path / "c.fasta")]})


@pytest.mark.parametrize("num_letters", [0, 1, 5_000, 10**9])
def test_joined_blocks_hold_the_same_records(num_letters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaprot.common.sequence_readers.fasta.BLOCK_BYTES", 3_000)
    blocks = [*exclusion.open_sequences(str(CUT)).blocks()][:40]
    records = [*read_fasta(CUT)][: sum(block.num_records for block in blocks)]
    joined = [*batches(iter(blocks), num_letters)]
    assert sum(block.num_records for block in joined) == len(records)
    expected = iter(records)
    for block in joined:
        for number in range(block.num_records):
            record = next(expected)
            assert block.letters[block.bounds[number] : block.bounds[number + 1]].tobytes() == record.sequence
            assert block.identifier(number) == record.identifier
            assert (block.lines[number], f"PF{block.families[number]:05d}") == (record.line, record.family)
