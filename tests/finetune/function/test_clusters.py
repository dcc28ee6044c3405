"""Shared k-mers, clusters by identity and neighbours against loops over all pairs."""

import random
import stat
from pathlib import Path

import edlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprot.common import mmseqs
from megaprot.common.errors import InputError, RunError
from megaprot.common.vocabulary import STANDARD_RESIDUES
from megaprot.finetune.function import clusters
from megaprot.finetune.function.alignment import find_hits
from megaprot.finetune.function.clusters import identity_clusters
from megaprot.finetune.function.kmer_similarity import KMER_LENGTH, KmerIndex


def kmers(sequence: bytes) -> set[bytes]:
    text = sequence.upper()
    all_of = {text[start : start + KMER_LENGTH] for start in range(len(text) - KMER_LENGTH + 1)}
    return {kmer for kmer in all_of if set(kmer.decode()) <= set(STANDARD_RESIDUES)}


def families(seed: int, num_families: int = 4, length: int = 60) -> list[bytes]:
    """Ancestors, each with descendants of more and more substitutions and a lost end."""
    draw = random.Random(seed)
    found = []
    for _ in range(num_families):
        letters = draw.choices(STANDARD_RESIDUES, k=length)
        for num_changes in (0, 3, 8, 20):
            for place in draw.sample(range(length), num_changes):
                letters[place] = draw.choice(STANDARD_RESIDUES)
            found.append("".join(letters[: length - draw.randrange(5)]).encode())
    return found


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 0.8]))
def test_hits_share_as_many_kmers_as_sets_do(seed: int, identity: float) -> None:
    sequences = [*families(seed), b"MKX", b"", b"mkvllaXmkvlla", b"MKVLLAMK"]
    queries = sequences[::3]
    hits = KmerIndex(sequences).hits(queries, identity)
    for number, query in enumerate(queries):
        expected = {}
        for other, target in enumerate(sequences):
            shared, least = len(kmers(query) & kmers(target)), min(len(kmers(query)), len(kmers(target)))
            if shared >= min(2, least) and shared and shared / least >= identity**KMER_LENGTH:
                expected[other] = pytest.approx(shared / len(kmers(query) | kmers(target)))
        places = slice(hits.starts[number], hits.starts[number + 1])
        assert dict(zip(hits.numbers[places].tolist(), hits.weights[places].tolist(), strict=True)) == expected
        assert (np.diff(hits.weights[places]) <= 0).all()


def naive_clusters(sequences: list[bytes], identity: float) -> list[int]:
    """Connected components of all pairs of this identity, by passing the lower number on until nothing changes."""
    cluster = list(range(len(sequences)))
    pairs = [
        (one, other)
        for one, first in enumerate(sequences)
        for other, second in enumerate(sequences[:one])
        if first == second
        or 1 - edlib.align(first, second)["editDistance"] / max(len(first), len(second)) >= identity - 1e-9
    ]
    for _ in sequences:
        for one, other in pairs:
            cluster[one] = cluster[other] = min(cluster[one], cluster[other])
    numbers = {first: number for number, first in enumerate(dict.fromkeys(cluster))}
    return [numbers[first] for first in cluster]


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.8, 0.9]))
def test_clusters_are_the_connected_components_of_all_pairs(seed: int, identity: float) -> None:
    sequences = families(seed)
    random.Random(seed).shuffle(sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "_BATCH", 5)
        assert identity_clusters(sequences, identity).tolist() == naive_clusters(sequences, identity)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_at_low_identity_only_what_is_alike_is_joined(seed: int) -> None:
    sequences = families(seed)  # evenly spread substitutions leave few k-mers: some pairs are not proposed
    expected, found = naive_clusters(sequences, 0.6), identity_clusters(sequences, 0.6).tolist()
    assert len(set(zip(expected, found, strict=True))) == len(set(found))  # each found cluster is within one expected
    assert len(set(found)) <= len(set(expected)) + 3


def test_sequences_without_kmers_are_clustered_when_equal() -> None:
    assert identity_clusters([b"MK", b"XXXXXX", b"MKV", b"MK", b"XXXXXX"], 0.5).tolist() == [0, 1, 2, 0, 1]


def test_a_shared_domain_does_not_join_two_proteins() -> None:
    domain, *rest = (family[:60] for family in families(5)[::4])
    assert identity_clusters([domain + rest[0], domain + rest[1], domain + rest[0]], 0.8).tolist() == [0, 1, 0]


@pytest.mark.parametrize("identity", [0.39, 1.01])
def test_an_identity_out_of_range_is_refused(identity: float) -> None:
    with pytest.raises(InputError, match=r"give a fraction from 0.4 to 1"):
        identity_clusters([b"MKV"], identity)


@pytest.mark.skipif(not mmseqs.is_installed(), reason="needs the program mmseqs")
def test_mmseqs_finds_the_family_of_a_query() -> None:
    sequences = families(3, length=150)
    hits = find_hits(sequences[::4], sequences, "mmseqs")
    for number in range(4):
        found = hits.numbers[hits.starts[number] : hits.starts[number + 1]]
        assert found[0] == 4 * number and set(found[1:].tolist()) <= set(range(4 * number, 4 * number + 4))
        assert len(found) >= 3


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of this name first on the PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_diamonds_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = r'printf "1\t0\t50.5\n1\t2\t99\n" > $2'
    script = f'if [ "$1" = blastp ]; then while [ "$1" != --out ]; do shift; done; {table}; fi'
    program(tmp_path, "diamond", script, monkeypatch)
    hits = find_hits([b"MKV", b"LLA"], [b"AAA", b"", b"CCC"], "diamond")
    assert (hits.starts.tolist(), hits.numbers.tolist(), hits.weights.tolist()) == ([0, 0, 2], [2, 0], [99, 50.5])
    program(tmp_path, "diamond", 'echo "no room" >&2; exit 3', monkeypatch)
    with pytest.raises(RunError, match=r"diamond makedb ended with status 3 \(no room\)"):
        find_hits([b"MKV"], [b"AAA"], "diamond")


def test_methods_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no method 'blast'"):
        find_hits([b"MKV"], [b"AAA"], "blast")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="needs the program diamond"):
        find_hits([b"MKV"], [b"AAA"], "diamond")
