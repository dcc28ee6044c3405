"""`megaprot score` against transformers and fair-esm one masked copy at a time, and what it says to wrong input."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from megaprot.tools import cli
from tests.finetune.folders import alone, bert_folder, esm_folder, random_proteins
from tests.tools.conversion.models import fair_esm_of

LETTERS = "LAGVSERTIDPKQNFYMHWCX"
WILD_TYPE = random_proteins([25], seed=8)[0].decode()


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return esm_folder(tmp_path_factory.mktemp("model") / "esm", intermediate_size=128)


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "wild.fasta"
    path.write_text(f">wild\n{WILD_TYPE}\n")
    return path


def other(position: int, step: int = 1) -> str:
    """A mutation of the wild type at a position counted from 1."""
    letter = WILD_TYPE[position - 1]
    return f"{letter}{position}{LETTERS[(LETTERS.index(letter) + step) % 20]}"


VARIANTS = [other(1), other(25), other(3), other(3, 2), f"{other(3)}:{other(9)}", f"{other(2)}:{other(24)}:{other(7)}"]


def score(model: Path, source: Path, output: Path, *more: str) -> int:
    return cli.main(["score", "--model", str(model), "--input", str(source), "--output", str(output), *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def refused(capsys: pytest.CaptureFixture[str], model: Path, source: Path, output: Path, *more: str) -> str:
    existed = output.exists()
    capsys.readouterr()
    assert score(model, source, output, *more) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert output.exists() == existed
    return said[0]


def by_hand(folder: Path, wild_type: str, variant: str, masked: bool) -> float:
    """A variant's marginal score by transformers, a forward pass a mutation, its own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for mutation in variant.split(":"):
        old, place, new = mutation[0], int(mutation[1:-1]) - 1, mutation[-1]
        mask = [place] if masked else []
        logits = alone(folder, wild_type, with_spaces="bert" in folder.name, mask=mask).logits[0, place + 1]
        log_p = logits.log_softmax(dim=-1)
        total += float(log_p[tokenizer.convert_tokens_to_ids(new)] - log_p[tokenizer.convert_tokens_to_ids(old)])
    return total


def perplexity_by_hand(folder: Path, sequence: str) -> float:
    """A sequence's pseudo-perplexity by transformers, a forward pass a residue."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for place in range(len(sequence)):
        log_p = alone(folder, sequence, mask=[place]).logits[0, place + 1].log_softmax(dim=-1)
        total += float(log_p[tokenizer.convert_tokens_to_ids(sequence[place])])
    return math.exp(-total / len(sequence))


@pytest.mark.parametrize("method", ["masked_marginal", "wild_type_marginal"])
def test_marginals_are_those_of_transformers(method: str, esm: Path, fasta: Path, tmp_path: Path) -> None:
    mutations = tmp_path / "mutations.tsv"
    mutations.write_text("\n".join(VARIANTS) + "\n")
    output = tmp_path / "scores.tsv"
    assert score(esm, fasta, output, "--mutations", str(mutations), "--method", method, "--max_tokens", "60") == 0
    rows = rows_of(output)
    assert [row["mutant"] for row in rows] == VARIANTS
    assert {row["identifier"] for row in rows} == {"wild"}
    for row in rows:
        expected = by_hand(esm, WILD_TYPE, row["mutant"], method == "masked_marginal")
        assert float(row["score"]) == pytest.approx(expected, abs=2e-5)


def test_masked_marginals_are_those_of_fair_esm(esm: Path, fasta: Path, tmp_path: Path) -> None:
    from esm.data import Alphabet
    from transformers import EsmForMaskedLM

    fair, alphabet = fair_esm_of(EsmForMaskedLM.from_pretrained(esm)), Alphabet.from_architecture("ESM-1b")
    _, _, tokens = alphabet.get_batch_converter()([("wild", WILD_TYPE)])
    mutations = tmp_path / "mutations.tsv"
    mutations.write_text("\n".join(VARIANTS) + "\n")
    assert score(esm, fasta, tmp_path / "scores.tsv", "--mutations", str(mutations)) == 0
    for row in rows_of(tmp_path / "scores.tsv"):
        expected = 0.0
        for mutation in row["mutant"].split(":"):
            place = int(mutation[1:-1])
            masked = tokens.clone()
            masked[0, place] = alphabet.mask_idx
            with torch.no_grad():
                log_p = fair(masked)["logits"][0, place].log_softmax(dim=-1)
            expected += float(log_p[alphabet.get_idx(mutation[-1])] - log_p[alphabet.get_idx(mutation[0])])
        assert float(row["score"]) == pytest.approx(expected, abs=2e-5)


def test_a_protein_beyond_the_models_positions_is_read_around_each_mutation(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")  # 62 residues at most
    protein = random_proteins([150], seed=4)[0].decode()
    (tmp_path / "long.fasta").write_text(f">long\n{protein}\n")
    places = {1: 0, 75: 74 - 31, 150: 150 - 62}  # position from 1: start of its window
    variants = [f"{protein[place - 1]}{place}{'A' if protein[place - 1] != 'A' else 'C'}" for place in places]
    (tmp_path / "mutations.tsv").write_text("\n".join(variants) + "\n")
    for method in ("masked_marginal", "wild_type_marginal"):
        output = tmp_path / f"{method}.tsv"
        more = ["--mutations", str(tmp_path / "mutations.tsv"), "--method", method]
        assert score(folder, tmp_path / "long.fasta", output, *more) == 0
        for row, (place, start) in zip(rows_of(output), places.items(), strict=True):
            inside = f"{row['mutant'][0]}{place - start}{row['mutant'][-1]}"
            expected = by_hand(folder, protein[start : start + 62], inside, method == "masked_marginal")
            assert float(row["score"]) == pytest.approx(expected, abs=2e-5)


def proteingym(path: Path, variants: Sequence[str], scores: Sequence[str], ending: str = "\n") -> Path:
    lines = ["mutant,mutated_sequence,DMS_score,DMS_score_bin"]
    for variant, measured in zip(variants, scores, strict=True):
        letters = list(WILD_TYPE)
        for mutation in variant.split(":"):
            letters[int(mutation[1:-1]) - 1] = mutation[-1]
        lines.append(f"{variant},{''.join(letters)},{measured},1")
    path.write_bytes((ending.join(lines) + ending).encode())
    return path


def test_a_proteingym_table_gives_spearmans_rho(
    esm: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = ["0.5", "-1", "2.25", "", "0.125", "7"]
    table = proteingym(tmp_path / "ASSAY.csv", VARIANTS, measured, ending="\r\n")
    assert score(esm, table, tmp_path / "scores.tsv") == 0
    rows = rows_of(tmp_path / "scores.tsv")
    assert [row["DMS_score"] for row in rows] == ["0.5", "-1.0", "2.25", "", "0.125", "7.0"]
    assert {row["identifier"] for row in rows} == {"ASSAY"}
    pairs = [(float(row["score"]), float(row["DMS_score"])) for row in rows if row["DMS_score"]]
    rho = spearmanr(*zip(*pairs, strict=True)).statistic
    assert f"Spearman's rho {rho:.4f} over 5 variants" in capsys.readouterr().out
    mutations = tmp_path / "mutations.tsv"
    mutations.write_text("\n".join(VARIANTS) + "\n")
    assert score(esm, fasta, tmp_path / "same.tsv", "--mutations", str(mutations)) == 0
    assert [row["score"] for row in rows_of(tmp_path / "same.tsv")] == [row["score"] for row in rows]


def test_pseudo_perplexity_is_that_of_transformers(
    esm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proteins = {"a": "MKVLAWGHIC", "b": "ACDEFGHIKLMNP"}
    source = tmp_path / "proteins.fasta"
    source.write_text("".join(f">{name}\n{text}\n" for name, text in proteins.items()))
    assert score(esm, source, tmp_path / "scores.tsv", "--method", "pseudo_perplexity") == 0
    for row in rows_of(tmp_path / "scores.tsv"):
        expected = perplexity_by_hand(esm, proteins[row["identifier"]])
        assert float(row["pseudo_perplexity"]) == pytest.approx(expected, rel=1e-4)
    table = proteingym(tmp_path / "ASSAY.csv", VARIANTS[:3], ["1", "2", "3"])
    assert score(esm, table, tmp_path / "variants.tsv", "--method", "pseudo_perplexity") == 0
    rows = rows_of(tmp_path / "variants.tsv")
    rho = spearmanr([-float(row["pseudo_perplexity"]) for row in rows], [1, 2, 3]).statistic
    assert f"minus the pseudo-perplexity {rho:.4f}" in capsys.readouterr().out


def test_several_wild_types_are_told_apart_by_a_column(esm: Path, tmp_path: Path) -> None:
    source = tmp_path / "proteins.fasta"
    source.write_text(">a\nMKVLA\n>b\nACDEF\n")
    mutations = tmp_path / "mutations.tsv"
    mutations.write_text("mutant\tidentifier\nM1A\ta\nA1M\tb\nF5A:C2A\tb\n")
    assert score(esm, source, tmp_path / "scores.tsv", "--mutations", str(mutations)) == 0
    rows = rows_of(tmp_path / "scores.tsv")
    assert [(row["identifier"], row["mutant"]) for row in rows] == [("a", "M1A"), ("b", "A1M"), ("b", "F5A:C2A")]
    for row in rows:
        wild_type = {"a": "MKVLA", "b": "ACDEF"}[row["identifier"]]
        assert float(row["score"]) == pytest.approx(by_hand(esm, wild_type, row["mutant"], True), abs=2e-5)


def test_equal_measurements_have_no_rank_correlation(
    esm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = proteingym(tmp_path / "ASSAY.csv", VARIANTS[:2], ["1", "1"])
    assert score(esm, table, tmp_path / "scores.tsv") == 0
    assert "not defined" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("A0T", "'A0T' is no substitution"),
        ("23", "'23' is no substitution"),
        ("A23", "'A23' is no substitution"),
        (f"{other(3)}:{other(3, 2)}", "changes a position twice"),
        ("A99T", "behind the end of wild, which has 25 residues"),
        (f"{'C' if WILD_TYPE[0] != 'C' else 'D'}1A", f"wild has {WILD_TYPE[0]} there"),
        (f"{WILD_TYPE[0]}1J", "has J, which the model has no token for"),
        ("", "holds no mutation"),
        ("mutant\tidentifier\nM1A\tother", "'other' is not in the input"),
        ("mutant\tDMS_score\nM1A\thigh", "mutations.tsv:2"),
        ("mutant\tDMS_score\nM1A", "1 fields instead of 2"),
    ],
)
def test_wrong_mutations_are_refused_with_file_and_line(
    text: str, complaint: str, esm: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mutations = tmp_path / "mutations.tsv"
    mutations.write_text(text + "\n")
    said = refused(capsys, esm, fasta, tmp_path / "scores.tsv", "--mutations", str(mutations))
    assert complaint in said
    assert str(mutations) in said


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sequence,score\nMKV,1\n", "has no mutant"),
        ("mutant,mutated_sequence\nM1A,CKV\n", "needs A at position 1"),
        ("mutant,mutated_sequence\nM1A,AKV\nM1C,CKL\n", "another wild type"),
        ("mutant,mutated_sequence,DMS_score\nM1A,AKV,x\n", "'x' is no number"),
        ("mutant,mutated_sequence\n", "has no rows"),
        ("", "has no rows"),
        ("mutant,mutated_sequence\nM1A,A7V\n", "holds '7'"),
    ],
)
def test_wrong_tables_are_refused(
    text: str, complaint: str, esm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "ASSAY.csv"
    table.write_text(text)
    assert complaint in refused(capsys, esm, table, tmp_path / "scores.tsv")


def test_other_wrong_input_is_refused(
    esm: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.tsv"
    table = proteingym(tmp_path / "ASSAY.csv", VARIANTS, ["1"] * 6)
    assert "needs --mutations" in refused(capsys, esm, fasta, output)
    assert "has its own mutations" in refused(capsys, esm, table, output, "--mutations", str(fasta))
    assert "is missing" in refused(capsys, esm, tmp_path / "nothing.fasta", output)
    assert "no config.json" in refused(capsys, tmp_path, table, output)
    assert "folder does not exist" in refused(capsys, esm, table, tmp_path / "no" / "scores.tsv")
    output.write_text("mine")
    assert "exists" in refused(capsys, esm, table, output)
    assert output.read_text() == "mine"


def test_an_encoder_without_a_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import EsmModel

    folder = esm_folder(tmp_path / "esm")
    EsmModel.from_pretrained(folder).save_pretrained(folder)
    table = proteingym(tmp_path / "ASSAY.csv", VARIANTS, ["1"] * 6)
    assert "score with a masked-language model" in refused(capsys, folder, table, tmp_path / "scores.tsv")
