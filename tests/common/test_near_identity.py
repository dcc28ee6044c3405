"""Near-identical sequences against edit distances of all pairs: by dynamic programming, and by edlib on domains."""

import gzip
import random
from functools import cache
from itertools import pairwise
from pathlib import Path

import edlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprot.common import mmseqs
from megaprot.common.errors import InputError, RunError
from megaprot.common.mmseqs import MmseqsSearch
from megaprot.common.near_identity import Matches, NearIdentityIndex, Sequences, nearest_excluded
from tests.common.columns import columns

CUT = Path(__file__).parents[2] / "examples" / "pfam" / "Pfam-A.cut.fasta.gz"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
AS_THEY_ARE = bytes(range(256))
needs_mmseqs = pytest.mark.skipif(not mmseqs.is_installed(), reason="needs the program mmseqs")


@cache
def domains_by_family() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in gzip.decompress(CUT.read_bytes()).decode().split(">")[1:]:
        header, _, sequence = text.partition("\n")
        found.setdefault(header.split()[2].partition(".")[0], []).append(sequence.replace("\n", ""))
    return found


def least_distance(shorter: str, longer: str) -> int:
    """The least edit distance of ``shorter`` to any stretch of ``longer``, by Sellers' dynamic programming."""
    row = [0] * (len(longer) + 1)
    for number, letter in enumerate(shorter, start=1):
        above, row = row, [number]
        for place, other in enumerate(longer):
            row.append(min(above[place] + (letter != other), above[place + 1] + 1, row[place] + 1))
    return min(row)


def naive_matches(queries: list[str], excluded: list[str], identity: float) -> list[tuple[int, int, float]]:
    found = []
    for query, text in enumerate(queries):
        best = (0.0, 0)
        for number, other in enumerate(excluded):
            shorter, longer = (text, other) if len(text) <= len(other) else (other, text)
            if shorter:
                best = max(best, (1 - least_distance(shorter, longer) / len(shorter), -number))
        if best[0] >= identity - 1e-9:
            found.append((query, -best[1], pytest.approx(best[0], abs=1e-6)))
    return found


def listed(matches: Matches) -> list[tuple[int, int, float]]:
    return list(zip(matches.queries.tolist(), matches.excluded.tolist(), matches.identities.tolist(), strict=True))


def search(queries: list[str], excluded: list[str], identity: float = 0.9) -> list[tuple[int, int, float]]:
    return listed(NearIdentityIndex(*columns(excluded), identity).matches(*columns(queries)))


def edited(text: str, num_edits: int, letters: str, choose: random.Random) -> str:
    """``text`` with substitutions, insertions and deletions at ``num_edits`` places."""
    sequence = list(text)
    for place in choose.sample(range(len(text)), num_edits):
        sequence[place] = choose.choice(["", choose.choice(letters), sequence[place] + choose.choice(letters)])
    return "".join(sequence)


@st.composite
def related_sequences(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Two lists of sequences, many of them edited stretches of one another, of few or many letters."""
    letters = draw(st.sampled_from(["A", "AC", "ACDE", RESIDUES]))
    choose = random.Random(draw(st.integers(0, 2**32)))
    sequences: list[str] = []
    for _ in range(draw(st.integers(1, 9))):
        text = "".join(choose.choices(letters, k=choose.randint(0, 40)))
        if sequences and choose.random() < 0.7:
            text = choose.choice(sequences)
            if choose.random() < 0.5:
                text = text[choose.randint(0, len(text) // 2) :][: choose.randint(0, len(text))]
            text = edited(text, choose.randint(0, len(text) // 6), letters, choose)
            text = choose.choice(["", "".join(choose.choices(letters, k=9))]) + text
        sequences.append(text)
    half = draw(st.integers(0, len(sequences)))
    return sequences[:half], sequences[half:]


@settings(max_examples=400)
@given(related_sequences(), st.sampled_from([0.5, 0.6, 0.65, 0.7, 0.8, 0.85, 0.88, 0.9, 0.93, 0.95, 1.0]))
def test_all_and_only_what_dynamic_programming_finds_is_found(
    lists: tuple[list[str], list[str]], identity: float
) -> None:
    queries, excluded = lists
    assert search(queries, excluded, identity) == naive_matches(queries, excluded, identity)


@pytest.mark.parametrize(
    ("length", "num_edits"), [(5, 0), (9, 0), (10, 1), (11, 1), (12, 1), (19, 1), (20, 2), (29, 2)]
)
def test_short_sequences_are_found_at_90_percent(length: int, num_edits: int) -> None:
    choose = random.Random(length)
    excluded = ["".join(choose.choices(RESIDUES, k=50)) for _ in range(60)]
    fragments = [text[choose.randrange(50 - length) :][:length] for text in excluded]
    queries = [edited(fragment, num_edits, RESIDUES, choose) for fragment in fragments]
    whole = [query for query, text in enumerate(queries) if len(text) >= length or not num_edits]  # else fewer may be
    assert {query for query, _, _ in search(queries, excluded)} >= set(whole)
    assert search(queries[:20], excluded) == naive_matches(queries[:20], excluded, 0.9)
    assert search(excluded[:9], queries[:20]) == naive_matches(excluded[:9], queries[:20], 0.9)


@given(related_sequences())
def test_with_other_codes_of_the_letters_the_result_is_the_same(lists: tuple[list[str], list[str]]) -> None:
    queries, excluded = (columns(texts) for texts in lists)
    ids = np.array([(7 * code + 100) % 256 for code in range(256)], dtype=np.uint8)
    with_ids = NearIdentityIndex(ids[excluded[0]], excluded[1], 0.9).matches(ids[queries[0]], queries[1])
    assert listed(with_ids) == listed(NearIdentityIndex(*excluded, 0.9).matches(*queries))


def test_variants_of_real_domains_at_95_percent_are_found_however_they_are_cut() -> None:
    choose = random.Random(0)
    families = domains_by_family()
    domains = [choice for texts in families.values() for choice in texts[:3] if len(choice) >= 20]
    around = 3 * list(families.values())
    proteins = [texts[-1] + domain + texts[-2] for domain, texts in zip(domains, around, strict=False)]
    variants = []
    for domain in domains[: len(proteins)]:
        num_edits = len(domain) // 20
        places = choose.sample(range(len(domain)), num_edits)
        cut = list(domain)
        for place in places:
            cut[place] = ""
        added, changed = list(domain), list(domain)
        for place in places:
            added[place] += choose.choice(RESIDUES)
            changed[place] = choose.choice(RESIDUES)
        variants += ["".join(cut), "".join(added), "".join(changed), edited(domain, num_edits, RESIDUES, choose)]
        variants += [domain[3:], domain[:-3], domain[len(domain) // 4 : -len(domain) // 4 or None]]
    assert len(variants) > 400
    # Domains among whole proteins that are excluded; and excluded fragments within whole proteins of the corpus.
    assert [query for query, _, _ in search(variants, proteins)] == list(range(len(variants)))
    assert [query for query, _, _ in search(proteins, variants)] == list(range(len(proteins)))


def test_of_real_domains_those_alike_are_found_and_those_below_half_are_not() -> None:
    texts = [text for family in list(domains_by_family().values())[:6] for text in family[:60]]
    queries, excluded = texts[::2], texts[1::2]
    expected = {}
    for query, text in enumerate(queries):
        identities = []
        for other in excluded:
            shorter, longer = (text, other) if len(text) <= len(other) else (other, text)
            identities.append(1 - edlib.align(shorter, longer, mode="HW")["editDistance"] / len(shorter))
        expected[query] = max(identities)
    assert min(expected.values()) < 0.5
    for identity in (0.9, 0.8):
        found = {query: nearest for query, _, nearest in search(queries, excluded, identity)}
        assert found == {
            query: pytest.approx(nearest) for query, nearest in expected.items() if nearest >= identity - 1e-9
        }
        assert found


def test_tiny_sequences_match_what_holds_them() -> None:
    assert search(["AC", "W", "", "KKACKK", "MMMM"], ["GGACGG", "", "KK", "MMM"]) == [
        (0, 0, 1.0),
        (3, 2, 1.0),
        (4, 3, 1.0),
    ]


def test_of_equally_near_excluded_sequences_the_first_is_named() -> None:
    domain = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    changed = domain.replace("Y", "W")
    assert search([domain], [changed, domain + "A", "C" + domain, domain]) == [(0, 1, 1.0)]
    assert search([domain], ["GGGGGGGG", changed, changed]) == [(0, 1, pytest.approx(1 - 1 / 33))]


def test_repeats_cost_no_more_than_other_sequences() -> None:
    choose = random.Random(1)
    excluded = ["Q" * choose.randint(6, 12) + "".join(choose.choices(RESIDUES, k=80)) for _ in range(3000)]
    index = NearIdentityIndex(*columns(excluded), 0.9)
    pairs = index._pairs(Sequences(*columns(["Q" * 5000, "QP" * 300, "Q" * 120])), 0, 3)
    assert len(pairs) < 60  # and not each of the 3,000 that hold QQQQQ
    assert search(["Q" * 400, "Q" * 10], [*excluded, "A" * 9 + "Q" * 600 + "AAAA"])[0] == (0, 3000, 1.0)


def test_more_repeats_than_a_count_holds_are_found() -> None:
    repeat = "Q" * 1500
    assert search([repeat + "A" * 30], [repeat]) == [(0, 0, 1.0)]
    assert search([repeat], ["A" + repeat]) == [(0, 0, 1.0)]


def test_many_queries_are_numbered_through() -> None:
    queries = ["".join(random.Random(number).choices(RESIDUES, k=30)) for number in range(2500)]
    assert search(queries, [queries[2400], queries[5], queries[1023]]) == [(5, 1, 1.0), (1023, 2, 1.0), (2400, 0, 1.0)]


@pytest.mark.parametrize("identity", [0.49, 1.01, float("nan")])
def test_an_identity_out_of_range_is_refused(identity: float) -> None:
    with pytest.raises(InputError, match=r"exclude\.identity is .*: give a fraction from 0\.5 to 1"):
        NearIdentityIndex(*columns(["ACD"]), identity)


def test_no_sequences_match_nothing() -> None:
    assert search([], ["ACDEFG"]) == search(["ACDEFG"], []) == search(["", ""], ["", "ACDEF"]) == []


def test_candidates_are_measured_by_the_same_rule_whoever_proposes_them() -> None:
    queries, excluded = (Sequences(*columns(texts)) for texts in (["ACDEFGHIKL", "MMMM"], ["ACDEFGHIKV", "ACD", "WWW"]))
    pairs = np.array([(0, 2), (0, 0), (1, 0)], dtype=np.int64)
    assert listed(nearest_excluded(queries, excluded, pairs, 0.8)) == [(0, 0, pytest.approx(0.9))]


@needs_mmseqs
@pytest.mark.slow
def test_mmseqs_finds_variants_of_real_domains_and_nothing_else() -> None:
    choose = random.Random(2)
    families = [texts for texts in domains_by_family().values() if len(texts[0]) >= 40][:30]
    proteins = [second[-1] + first[0] + second[-2] for first, second in pairwise(families)]
    variants = [edited(texts[0], len(texts[0]) // 20, RESIDUES, choose) for texts in families[:-1]]
    strangers = ["".join(choose.choices(RESIDUES, k=100)) for _ in range(5)]
    finder = MmseqsSearch(*columns(proteins), 0.9, AS_THEY_ARE)
    assert finder.method.startswith("mmseqs ")
    expected = search([*variants, "", *strangers], proteins)
    assert [query for query, _, _ in expected] == list(range(len(variants)))
    assert listed(finder.matches(*columns([*variants, "", *strangers]))) == expected
    assert listed(finder.matches(*columns(["", ""]))) == []


def test_the_program_is_chosen_where_it_is_better_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmseqs, "is_installed", lambda: True)
    assert [mmseqs.chosen_method("auto", identity) for identity in (0.9, 0.75, 0.7)] == ["kmer", "kmer", "mmseqs"]
    assert mmseqs.chosen_method("mmseqs", 0.9) == "mmseqs"
    assert mmseqs.chosen_method("kmer", 0.5) == "kmer"
    monkeypatch.setattr(mmseqs, "is_installed", lambda: False)
    assert mmseqs.chosen_method("auto", 0.7) == "kmer"


def test_a_missing_or_failing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs the program mmseqs, which is not on the PATH"):
        MmseqsSearch(*columns(["ACD"]), 0.9, AS_THEY_ARE)
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\n[ $1 = version ] && echo 99 || { echo no space left >&2; exit 3; }\n")
    program.chmod(0o755)
    with pytest.raises(RunError, match=r"mmseqs createdb ended with status 3 \(no space left\)"):
        MmseqsSearch(*columns(["ACD"]), 0.9, AS_THEY_ARE)
