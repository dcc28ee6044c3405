"""Splits by sequence, family, clan and cluster, and what is held out: against the tables themselves."""

import gzip
import hashlib
import itertools
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import read_fasta
from megaprot.pretrain.corpus import Corpus
from megaprot.tools.preprocessing.config import SplitConfig
from megaprot.tools.preprocessing.splits import TAPE_HOLD_OUT, Splitter, read_clans
from tests.tools.preprocess_runs import CLANS, CUT, made_sequences, preprocess, texts, write_fasta


def families_by_split(corpora: dict[str, Corpus]) -> dict[str, dict[str, int]]:
    return {name: corpus.manifest["families"] for name, corpus in corpora.items()}


def families_of_the_cut() -> Counter[str]:
    return Counter(record.family for record in read_fasta(CUT))


def test_the_split_depends_on_the_sequence_and_the_seed_alone(tmp_path: Path) -> None:
    sequences = made_sequences(400)
    first = preprocess([write_fasta(tmp_path / "a.fasta", sequences)], tmp_path / "a", split={"valid": 0.3})
    others = [*reversed(sequences), *sequences[::3], *made_sequences(100, seed=1)]
    inputs = [
        write_fasta(tmp_path / "b.fasta", [text.lower() for text in others[:250]]),
        write_fasta(tmp_path / "c.fasta", others[250:]),
    ]
    second = preprocess(inputs, tmp_path / "b", split={"valid": 0.3})
    inputs = [write_fasta(tmp_path / "d.fasta", sequences)]
    reseeded = preprocess(inputs, tmp_path / "d", split={"valid": 0.3, "seed": 7})
    assert set(texts(second["valid"])) >= set(texts(first["valid"]))
    assert not set(texts(second["valid"])) & set(texts(second["train"]))
    assert set(texts(reseeded["valid"])) != set(texts(first["valid"]))
    assert abs(len(set(texts(reseeded["valid"]))) - 120) < 40


def test_a_family_lies_in_one_split(tmp_path: Path) -> None:
    corpora = preprocess([str(CUT)], tmp_path / "out", split={"by": "family", "valid": 0.1, "test": 0.1})
    families = families_by_split(corpora)
    expected = families_of_the_cut()
    assert {**families["train"], **families["valid"], **families["test"]} == expected
    assert sum(map(len, families.values())) == len(expected)


def test_a_clan_lies_in_one_split(tmp_path: Path) -> None:
    split = {"by": "clan", "clans": str(CLANS), "valid": 0.2, "test": 0.1}
    corpora = preprocess([str(CUT)], tmp_path / "out", split=split)
    splits_of_clan = defaultdict(set)
    table = dict(line.split("\t")[:2] for line in CLANS.read_text().splitlines())
    for name, families in families_by_split(corpora).items():
        for family in families:
            splits_of_clan[table[family] or family].add(name)
    assert {len(splits) for splits in splits_of_clan.values()} == {1}
    assert len(splits_of_clan) < len(table)
    assert corpora["train"].manifest["split"] == {
        "name": "train", **split, "hold_out": [], "clusters": "", "seed": 1234,
        "clans_sha256": hashlib.sha256(CLANS.read_bytes()).hexdigest(),
    }  # fmt: skip


def test_the_clans_table_is_read_plain_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "clans.tsv.gz").write_bytes(gzip.compress(CLANS.read_bytes()))
    expected = {}
    for line in CLANS.read_text().splitlines():
        family, clan = line.split("\t")[:2]
        expected[int(family[2:])] = int(clan[2:] or 0)
    assert read_clans(CLANS) == read_clans(tmp_path / "clans.tsv.gz") == expected


def test_families_missing_from_the_clans_table_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "clans.tsv"
    table.write_text("".join(CLANS.read_text().splitlines(keepends=True)[:-2]))
    preprocess([str(CUT)], tmp_path / "out", split={"by": "clan", "clans": str(table), "valid": 0.2})
    assert "families not in the clans table, each taken as its own clan: 2" in capsys.readouterr().out


def test_families_and_clans_held_out_go_to_the_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = dict(line.split("\t")[:2] for line in CLANS.read_text().splitlines())
    counts = families_of_the_cut()
    clan = next(clan for clan, number in Counter(filter(None, table.values())).items() if number > 1)
    family = next(family for family, of in table.items() if of != clan)
    (tmp_path / "held.txt").write_text(f"{clan}\n\n")
    split = {"hold_out": [family, str(tmp_path / "held.txt")], "clans": str(CLANS), "valid": 0.1}
    families = families_by_split(preprocess([str(CUT)], tmp_path / "out", split=split))
    expected = {name for name, of in table.items() if of == clan or name == family}
    assert families["test"] == {name: counts[name] for name in expected}
    assert not expected & ({*families["train"]} | {*families["valid"]})
    assert f"held out: {sum(families['test'].values()):,} sequences" in capsys.readouterr().out


def test_the_rest_is_divided_as_without_a_hold_out(tmp_path: Path) -> None:
    family = next(iter(families_of_the_cut()))
    held = preprocess([str(CUT)], tmp_path / "a", split={"hold_out": [family], "valid": 0.3, "test": 0.1})
    free = preprocess([str(CUT)], tmp_path / "b", split={"valid": 0.3, "test": 0.1})
    of_family = {record.sequence.decode() for record in read_fasta(CUT) if record.family == family}
    for name in ("train", "valid"):
        assert texts(held[name]) == [text for text in texts(free[name]) if text not in of_family]
    assert set(texts(held["test"])) == set(texts(free["test"])) | of_family


def test_identifiers_held_out_go_to_the_test_split(tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(
        ">sp|P1|X_HUMAN d\nMKA\n>s1 PF00001.2;\nMKC\n>s10\nMKD\n>tr|Q2|Y\nMKE\n>xx|Q2|Y\nMKF\n"
    )
    (tmp_path / "held.txt").write_bytes(b"P1\r\ns10\n tr|Q2|Y \n")
    split = {"hold_out": [str(tmp_path / "held.txt")], "valid": 0.0}
    corpora = preprocess([str(tmp_path / "a.fasta")], tmp_path / "out", split=split)
    assert {name: texts(corpus) for name, corpus in corpora.items()} == {
        "train": ["MKC", "MKF"],
        "test": ["MKA", "MKD", "MKE"],
    }


def test_the_tape_preset_holds_out_tape_s_clans_and_families(tmp_path: Path) -> None:
    clans = {int(name[2:]) for name in TAPE_HOLD_OUT if name.startswith("CL")}
    table = tmp_path / "clans.tsv"
    lines = [f"PF{number:05d}\tCL{clan:04d}\tx\n" for number, clan in enumerate(sorted(clans), start=1)]
    table.write_text("".join([*lines, "PF00050\tCL0001\ty\n", "PF14604\t\tz\n"]))
    families = [1, 6, 50, 14604, 3577, 3578]
    path = write_fasta(tmp_path / "a.fasta", made_sequences(6), families)
    split = {"hold_out": ["tape"], "clans": str(table), "valid": 0.0}
    found = families_by_split(preprocess([path], tmp_path / "out", split=split))
    assert {*found["test"]} == {"PF00001", "PF00006", "PF14604", "PF03577"}
    assert {*found["train"]} == {"PF00050", "PF03578"}


def write_clusters(path: Path, clusters: list[list[str]]) -> str:
    path.write_text("".join(f"{members[0]}\t{member}\n" for members in clusters for member in members))
    return str(path)


@pytest.mark.parametrize("by", ["cluster", "random"])
def test_the_table_of_clusters_is_kept_with_the_corpora(
    tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences = made_sequences(200)
    numbers = [number * 7 % 200 for number in range(190)]  # ten are in no cluster
    clusters = [[f"s{number}" for number in numbers[start : start + 4]] for start in range(0, 190, 4)]
    table = write_clusters(tmp_path / "clusters.tsv", clusters)
    corpora = preprocess(
        [write_fasta(tmp_path / "a.fasta", sequences)], tmp_path / "out",
        split={"by": by, "clusters": table, "valid": 0.2, "test": 0.1},
    )  # fmt: skip
    cluster_of = {name: number for number, members in enumerate(clusters) for name in members}
    splits_of: dict[object, set[str]] = defaultdict(set)
    for name, corpus in corpora.items():
        of_sequence = [f"s{sequences.index(text)}" for text in texts(corpus)]
        starts, members = corpus.clusters
        found = {tuple(members[start:end].tolist()) for start, end in itertools.pairwise(starts)}
        expected = defaultdict(list)
        for number, identifier in enumerate(of_sequence):
            expected[cluster_of.get(identifier, identifier)].append(number)
            splits_of[cluster_of.get(identifier, identifier)].add(name)
        assert found == {tuple(numbers) for numbers in expected.values()}
        corpus.verify()
    if by == "cluster":
        assert {len(splits) for splits in splits_of.values()} == {1}
    assert "not in the table of clusters, each taken as its own cluster: 10 sequences" in capsys.readouterr().out


def test_a_cluster_with_a_member_held_out_is_held_out_whole(tmp_path: Path) -> None:
    sequences = made_sequences(40)
    table = write_clusters(tmp_path / "c.tsv", [[f"s{start}", f"s{start + 20}"] for start in range(20)])
    (tmp_path / "held.txt").write_text("s3\ns25\n")
    split = {"by": "cluster", "clusters": table, "hold_out": [str(tmp_path / "held.txt")], "valid": 0.0}
    corpora = preprocess([write_fasta(tmp_path / "a.fasta", sequences)], tmp_path / "out", split=split)
    assert texts(corpora["test"]) == [sequences[number] for number in (3, 5, 23, 25)]


def test_every_fraction_of_families_is_met_on_average() -> None:
    splitter = Splitter(SplitConfig(by="family", valid=0.2, test=0.3))
    families = np.arange(20_000, dtype=np.int32)
    splits = splitter.assign(np.zeros(20_000, np.uint64), families, np.empty(0, np.uint64))
    shares = np.bincount(splits) / 20_000
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.015)
    assert (splitter.assign(np.ones(20_000, np.uint64), families, np.empty(0, np.uint64)) == splits).all()


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"valid": 0.6, "test": 0.4}, "leave nothing to train on"),
        ({"valid": -0.1}, "leave nothing to train on"),
        ({"valid": float("nan")}, "leave nothing to train on"),
        ({"by": "clan"}, "need each other"),
        ({"by": "family", "clans": "x.tsv"}, "need each other"),
        ({"hold_out": ["CL0001"]}, "need each other"),
        ({"hold_out": ["CL9999"], "clans": str(CLANS)}, r"clans\.cut\.tsv: has no family of CL9999"),
        ({"hold_out": ["PF12"]}, "names 'PF12', which is no Pfam family"),
        ({"hold_out": ["PF99999"]}, r"no sequence of the input is among split\.hold_out PF99999"),
        ({"by": "clan", "clans": "x.tsv"}, r"x\.tsv: cannot be read"),
        ({"by": "clan", "clans": __file__}, r"test_preprocess_splits\.py:1: is not 'family<TAB>clan"),
        ({"by": "cluster"}, "needs a table of clusters"),
        ({"clusters": __file__}, r"test_preprocess_splits\.py:1: is not 'cluster<TAB>member'"),
        (
            {"by": "cluster", "clusters": str(CLANS), "hold_out": ["PF00001"]},
            "takes only files of sequence identifiers",
        ),
        ({"valid": 1e-9}, r"split 'valid' got no sequence from so few sequences: raise split\.valid or change"),
        ({"valid": 0.5, "test": 1e-9}, r"split 'test' got no sequence.*: raise split\.test"),
        ({"valid": 0.999999}, r"split 'train' got no sequence.*: lower split\.valid and split\.test"),
    ],
)
def test_wrong_split_settings_are_answered_with_a_remedy(tmp_path: Path, split: dict[str, object], said: str) -> None:
    path = write_fasta(tmp_path / "a.fasta", made_sequences(20), families=[*range(20)])
    with pytest.raises(InputError, match=said):
        preprocess([path], tmp_path / "out", split=split)
    assert os.listdir(tmp_path) == ["a.fasta"]


def test_a_member_of_two_clusters_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "c.tsv"
    table.write_text("a\ta\na\tb\nc\tb\n")
    with pytest.raises(InputError, match=r"c\.tsv:3: names a member that another cluster has too"):
        Splitter(SplitConfig(clusters=str(table)))
