"""Reading sequences and annotations in both formats, and what becomes of records that cannot be used."""

import gzip
from pathlib import Path

import pytest

from megaprot.common.errors import InputError
from megaprot.finetune.function.annotations import FunctionData, read_function_data
from tests.finetune.function.ontologies import Terms, named, obo_text

ROOT, KINASE, BINDING, GROWTH = "GO:0003674", "GO:0016301", "GO:0005488", "GO:0040007"
TERMS: Terms = {
    ROOT: (2, {}),
    KINASE: (2, {ROOT: "is_a"}),
    BINDING: (2, {ROOT: "is_a"}),
    "GO:0008150": (0, {}),
    GROWTH: (0, {"GO:0008150": "is_a"}),
}
OTHERS = f"""
[Term]
id: GO:0000090
name: old kinase
namespace: molecular_function
is_obsolete: true
replaced_by: {KINASE}

[Term]
id: GO:0000091
name: old thing
namespace: molecular_function
is_obsolete: true
"""
FASTA = ">P1 a kinase\nMKV\nLLA\n>sp|P2|NAME_YEAST\nmkx\n>P3\nAAA\n>P4\nCCC\n"
HEADER = "EntryID\tterm\taspect\n"


def folder_of(folder: Path, rows: str, name: str = "train_terms.tsv", fasta: str = FASTA) -> Path:
    (folder / "go-basic.obo").write_text(obo_text(TERMS, OTHERS))
    (folder / "train_sequences.fasta").write_text(fasta)
    (folder / name).write_text(rows)
    return folder


def table(*rows: str) -> str:
    return HEADER + "".join(row.replace(" ", "\t") + "\n" for row in rows)


def terms_by_protein(data: FunctionData) -> dict[str, set[str]]:
    return dict(zip(data.identifiers, named(data.ontology, data.annotated), strict=True))


def gaf_line(protein: str, term: str, evidence: str = "IDA", qualifier: str = "enables", aspect: str = "F") -> str:
    cells = ["UniProtKB", protein, "NAME", qualifier, term, "PMID:1", evidence, "", aspect, "", "", "protein",
             "taxon:9606", "20220701", "UniProt", "", ""]  # fmt: skip
    return "\t".join(cells) + "\n"


def test_a_table_is_joined_with_its_sequences(tmp_path: Path) -> None:
    data = read_function_data(folder_of(tmp_path, table(f"P2 {KINASE} MFO", f"P1 {GROWTH} BPO", f"P1 {KINASE} MFO")))
    assert data.identifiers == ("P1", "P2")
    assert data.sequences == (b"MKVLLA", b"mkx")
    assert terms_by_protein(data) == {"P1": {GROWTH, KINASE}, "P2": {KINASE}}
    assert named(data.ontology, data.labels) == [{GROWTH, KINASE, ROOT, "GO:0008150"}, {KINASE, ROOT}]
    assert data.counts["proteins with a molecular function"] == 2
    assert data.counts["proteins with a biological process"] == 1
    assert data.counts["proteins with a cellular component"] == 0


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    rows = table(
        f"P1 {KINASE} MFO", f"P1 {KINASE} MFO", "P2 GO:0000090 MFO", "P2 GO:0000091 MFO", "P1 GO:7777777 MFO",
        f"P3 {GROWTH} MFO", f"P9 {KINASE} MFO", f"P8 {KINASE} MFO")  # fmt: skip
    data = read_function_data(folder_of(tmp_path, rows))
    assert terms_by_protein(data) == {"P1": {KINASE}, "P2": {KINASE}, "P3": {GROWTH}}
    expected = {
        "lines": 8,
        "annotations": 7,
        "sequences": 4,
        "annotations of an alternative or replaced term, put right": 1,
        "annotations of an obsolete term, left out": 1,
        "annotations of an unknown term, left out": 1,
        "annotations under another namespace than the ontology's, which holds": 1,
        "proteins without a sequence, left out": 2,
        "sequences without a term, left out": 1,
        "proteins": 3,
    }
    assert {name: data.counts[name] for name in expected} == expected


def test_a_gaf_file_counts_by_qualifier_and_evidence(tmp_path: Path) -> None:
    rows = "!gaf-version: 2.2\n!generated-by: GOC\n" + gaf_line("P1", KINASE) + gaf_line("P1", BINDING, evidence="IEA")
    rows += gaf_line("P2", BINDING, qualifier="NOT|enables") + gaf_line("P2", GROWTH, "TAS", "involved_in", "P")
    (tmp_path / "a").mkdir()
    data = read_function_data(folder_of(tmp_path / "a", rows, "human.gaf"))
    assert terms_by_protein(data) == {"P1": {KINASE}, "P2": {GROWTH}}
    assert data.counts["annotations that say NOT, left out"] == 1
    assert data.counts["annotations of other evidence, left out"] == 1
    (tmp_path / "b").mkdir()
    packed = folder_of(tmp_path / "b", rows, "human.gaf")
    (packed / "human.gaf.gz").write_bytes(gzip.compress((packed / "human.gaf").read_bytes()))
    (packed / "human.gaf").unlink()
    data = read_function_data(packed, frozenset({"IDA", "IEA"}))
    assert terms_by_protein(data) == {"P1": {KINASE, BINDING}}
    assert data.counts["sequences without a term, left out"] == 3


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("train_terms.tsv", table(f"P1 {KINASE} MFO", f"P2 {KINASE}"), r"train_terms.tsv:3: is not 'EntryID"),
        ("train_terms.tsv", table(f"P1 {KINASE} F"), "an aspect of BPO, CCO, MFO"),
        ("train_terms.tsv", table("P1 GO:7777777 MFO"), "no protein has both"),
        ("train_terms.tsv", table(f"Q1 {KINASE} MFO"), "no protein has both"),
        ("train_terms.tsv", "", "no protein has both"),
        ("some.gaf", table(f"P1 {KINASE} MFO"), "some.gaf:1: is not a line of a GAF"),
        ("some.gaf", gaf_line("P1", KINASE, aspect="MFO"), "some.gaf:1: is not a line of a GAF"),
        ("other.tsv", table(f"P1 {KINASE} MFO"), "holds no train_terms.tsv"),
    ],
)
def test_a_wrong_file_of_annotations_is_one_sentence(tmp_path: Path, name: str, rows: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_function_data(folder_of(tmp_path, rows, name))
    assert str(tmp_path) in str(raised.value)


def test_two_files_of_annotations_and_a_protein_twice_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, gaf_line("P1", KINASE), "one.gaf")
    folder_of(tmp_path, table(f"P1 {KINASE} MFO"))
    with pytest.raises(InputError, match=r"holds annotations twice, one.gaf and train_terms.tsv"):
        read_function_data(tmp_path)
    (tmp_path / "one.gaf").unlink()
    folder_of(tmp_path, table(f"P1 {KINASE} MFO"), fasta=FASTA + ">tr|P1|AGAIN\nMMM\n")
    with pytest.raises(InputError, match="the protein P1 is there twice"):
        read_function_data(tmp_path)


def test_a_record_without_a_sequence_is_counted(tmp_path: Path) -> None:
    rows = table(f"P1 {KINASE} MFO", f"P2 {KINASE} MFO")
    data = read_function_data(folder_of(tmp_path, rows, fasta=">P1\n>P2\nMKV\n"))
    assert data.identifiers == ("P2",)
    assert data.counts["records without a sequence or identifier, left out"] == 1
    assert data.counts["proteins without a sequence, left out"] == 1
