"""Files of pairs in all layouts, the sentence for each kind of bad input, and pairs as one row of tokens."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.batch import num_pair_boundaries, pack_pairs
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.pairs.cuts import longest_first, residue_budget, window_pairs
from megaprot.finetune.pairs.files import ProteinTable, find_pairs, iterate_pairs, read_pairs, sequence_name
from megaprot.finetune.pairs.inputs import Reading, gather_pairs
from tests.finetune.folders import bert_folder, esm_folder, megatron_bert_folder, random_proteins, residue_ids

ESM = get_vocabulary("esm")
FASTA = ">P1 one\nMKV\nLA\n>P2\nGGSY\n>P3\nWWDE\n"


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def letters(residues: np.ndarray) -> str:
    return "".join(ESM.tokens[index] for index in residues)


def test_a_folder_of_tables_and_one_fasta(tmp_path: Path) -> None:
    files = {"train.tsv": "P1\tP2\t1\n\nP3\tP1\t0\n", "valid.tsv": "P2\tP3\t1", "sequences.fasta": FASTA}
    examples = read_pairs(written(tmp_path, files), "train", ESM)
    found = [(one.number, one.record, one.first, one.second, one.label) for one in examples]
    assert found == [(0, 1, "P1", "P2", 1), (1, 3, "P3", "P1", 0)]
    assert [letters(examples[0].residues_first), letters(examples[0].residues_second)] == ["MKVLA", "GGSY"]
    (other,) = read_pairs(tmp_path, "valid", ESM)
    assert other.residues_first is examples[0].residues_second  # one table for all splits


def test_d_scripts_layout(tmp_path: Path) -> None:
    """The species of the pairs chooses the FASTA file; a random negative may pair a protein with itself."""
    files = {"pairs/human_train.tsv": "P1\tP2\t1.0\n", "pairs/human_test.tsv": "P2\tP1\t0.0\nP2\tP2\t0.0\n",
             "pairs/yeast_test.tsv": "Y1\tY2\t1.0\n", "seqs/human.fasta": FASTA,
             "seqs/yeast.fasta": ">Y1\nMK\n>Y2\nGG\n"}  # fmt: skip
    written(tmp_path, files)
    assert [one.label for one in read_pairs(tmp_path, "train", ESM)] == [1]
    assert [one.label for one in read_pairs(tmp_path, "valid", ESM)] == [0, 0]
    assert letters(read_pairs(tmp_path, "yeast_test", ESM)[0].residues_second) == "GG"
    with pytest.raises(InputError, match="holds 2 files of pairs of the split 'test'; name one of its files: human_t"):
        find_pairs(tmp_path, "test")


def test_plm_interacts_table_names_proteins_by_their_sequence(tmp_path: Path) -> None:
    written(tmp_path, {"dev.csv": "query,text,label\nMKV,GGS,1\nggs,MKV,0\n", "train.csv": "query,text\nMKV,GG\n"})
    first, second = read_pairs(tmp_path, "valid", ESM)
    assert (first.first, first.second) == (sequence_name(b"mkv"), sequence_name(b"GGS"))
    assert (second.second, second.first) == (first.first, first.second)
    assert first.residues_first is second.residues_second
    proteins = ProteinTable(ESM, "here")
    (pair,) = iterate_pairs(tmp_path / "train.csv", proteins)
    assert pair.label is None
    assert {letters(proteins[name]) for name in proteins} == {"MKV", "GG"}


def test_compressed_files(tmp_path: Path) -> None:
    for name, text in (("test.tsv.gz", "P1\tP2\t1\n"), ("all.fa.gz", FASTA)):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert letters(read_pairs(tmp_path, "test", ESM)[0].residues_first) == "MKVLA"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"test.tsv": "P1\tP2\t1\nP1\tP9\t0\n"}, r"test.tsv:2: P9 has no sequence in .*s.fasta; add it"),
        ({"test.tsv": "P1\tP1\t1\n"}, r"test.tsv:1: pairs P1 with itself; remove the line"),
        ({"test.tsv": "P1\tP2\t2\n"}, r"test.tsv:1: the label '2' is neither 0 nor 1"),
        ({"test.tsv": "P1\tP2\t1\nP1\tP3\n"}, r"test.tsv:2: has no label; give 0 or 1"),
        ({"test.tsv": "P1 P2 1\n"}, r"test.tsv:1: has 1 columns; give two names"),
        ({"test.tsv": "P1\t\t1\n"}, r"test.tsv:1: names one protein only"),
        ({"test.tsv": "\n"}, r"test.tsv holds no pair"),
        ({"test.tsv": "P1\tP2\t1\n", "s.fasta": ">P1\nMKV\n>P2\n"}, r"s.fasta:3: record 'P2' has no sequence; the f"),
        ({"test.tsv": "P1\tP2\t1\n", "s.fasta": ">P1\nMKV\n>P2\nA7\n"}, r"s.fasta:3: the sequence of P2 holds '7'"),
        ({"test.tsv": "P1\tP2\t1\n", "s.fasta": ">P1\nMKV\n>P1\nMA\n"}, r"s.fasta:3: P1 has another sequence at .*:1"),
        ({"test.tsv": "P1\tP2\t1\n", "s.fasta": ""}, r"s.fasta: is empty"),
        ({"test.tsv": "P1\tP2\t1\n", "t.fasta": FASTA}, r"has 2 FASTA files \(s, t\) and none is named as test.tsv is"),
        ({"other.tsv": "P1\tP2\t1\n"}, r"holds no pairs of the split 'test'; name one of its files: other"),
        ({"test.csv": "query,text,label\nMKV,MKV,1\n"}, r"test.csv:2: pairs sequence_\w+ with itself"),
        ({"test.csv": "query,label\nMKV,1\n"}, r"test.csv: has no column 'text' in its first line"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    written(tmp_path, {"s.fasta": FASTA, **files})
    with pytest.raises(InputError, match=sentence):
        read_pairs(tmp_path, "test", ESM)


def test_a_cut_compressed_fasta_is_one_sentence(tmp_path: Path) -> None:
    written(tmp_path, {"test.tsv": "P1\tP2\t1\n"})
    (tmp_path / "s.fasta.gz").write_bytes(gzip.compress(FASTA.encode() * 50)[:-9])
    with pytest.raises(InputError, match="compressed file is truncated"):
        read_pairs(tmp_path, "test", ESM)


def tokenized(folder: Path, first: str, second: str, **options: int) -> dict[str, list[int]]:
    """What transformers' tokenizer makes of a pair."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(text) if "bert" in folder.name else text for text in (first, second)]
    truncation = {"truncation": "longest_first"} if options else {}
    return dict(tokenizer(*texts, **truncation, **options))


MAKERS = {"esm": esm_folder, "bert": bert_folder, "plain": megatron_bert_folder}


@pytest.mark.parametrize("name", MAKERS)
def test_pairs_are_joined_as_transformers_tokenizer_joins_them(name: str, tmp_path: Path) -> None:
    encoder = load_encoder(MAKERS[name](tmp_path / name))  # type: ignore[operator]
    pairs = [(5, 3), (1, 7)]
    proteins = [random_proteins(lengths, seed) for seed, lengths in enumerate(pairs)]
    row = pack_pairs(encoder.vocabulary, [tuple(residue_ids(encoder, both)) for both in proteins])  # type: ignore[misc]
    types = row.is_second.long() * encoder.second_type
    for number, (first, second) in enumerate(proteins):
        expected = tokenized(tmp_path / name, first.decode(), second.decode())
        assert row.tokens.split(row.lengths)[number].tolist() == expected["input_ids"]
        assert row.positions.split(row.lengths)[number].tolist() == list(range(len(expected["input_ids"])))
        assert types.split(row.lengths)[number].tolist() == expected.get("token_type_ids", [0] * row.lengths[number])
        assert int(row.is_residue.split(row.lengths)[number].sum()) == sum(pairs[number])
    assert encoder.second_type == (1 if name == "bert" else 0)


def test_means_of_both_proteins_leave_boundaries_out() -> None:
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(4, 24, one), generator.integers(4, 24, other)) for one, other in ((4, 2), (1, 6))]
    row = pack_pairs(ESM, pairs)
    states = torch.randn(len(row.tokens), 3)
    first, second = row.means(states)
    start = 0
    for number, (one, other) in enumerate(pairs):
        middle = start + 1 + len(one)
        assert torch.allclose(first[number], states[start + 1 : middle].mean(0), atol=1e-6)
        assert torch.allclose(second[number], states[middle + 1 : middle + 1 + len(other)].mean(0), atol=1e-6)
        start = middle + len(other) + 2


@pytest.mark.parametrize("name", ["bert", "plain"])
def test_states_of_pairs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Token types and positions of the second protein reach the model, padding-free or padded."""
    from transformers import AutoModelForMaskedLM

    folder: Path = MAKERS[name](tmp_path / name)  # type: ignore[operator]
    encoder = load_encoder(folder)
    proteins = [random_proteins(lengths, 3) for lengths in ((5, 3), (2, 9))]
    row = pack_pairs(encoder.vocabulary, [tuple(residue_ids(encoder, both)) for both in proteins])  # type: ignore[misc]
    (states,) = encoder(row)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval().base_model
    for number, (first, second) in enumerate(proteins):
        inputs = tokenized(folder, first.decode(), second.decode())
        expected = model(**{key: torch.tensor([value]) for key, value in inputs.items()}).last_hidden_state[0]
        assert torch.allclose(states.split(row.lengths)[number], expected, atol=1e-5)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 70))
def test_the_longer_protein_loses_its_end_first(num_first: int, num_second: int, budget: int) -> None:
    first, second = num_first, num_second
    while first + second > budget:
        first, second = (first - 1, second) if first > second else (first, second - 1)
    assert longest_first(num_first, num_second, budget) == (first, second)
    assert longest_first(num_first, num_second, 0) == (num_first, num_second)


def test_truncation_is_that_of_transformers(tmp_path: Path) -> None:
    folder = esm_folder(tmp_path / "esm")
    for lengths in ((20, 9), (9, 20), (20, 20), (4, 30)):
        first, second = (protein.decode() for protein in random_proteins(lengths, 1))
        keep = longest_first(*lengths, 21 - num_pair_boundaries(ESM))
        expected = tokenized(folder, first, second, max_length=21)["input_ids"]
        assert pack_pairs(ESM, [(ESM.encode(first.encode())[0][: keep[0]], ESM.encode(second.encode())[0][: keep[1]])]
                          ).tokens.tolist() == expected  # fmt: skip


def test_the_encoders_positions_and_the_runs_length_both_limit_a_pair(tmp_path: Path) -> None:
    absolute, rotary = load_encoder(bert_folder(tmp_path / "bert")), load_encoder(esm_folder(tmp_path / "esm"))
    found = [residue_budget(encoder, length) for encoder in (absolute, rotary) for length in (0, 40, 4000)]
    assert found == [61, 37, 61, 0, 37, 3997]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 40))
def test_windows_show_every_residue_beside_every_other(num_first: int, num_second: int, budget: int) -> None:
    seen = np.zeros((num_first, num_second), dtype=bool)
    for (start, end), (begin, until) in window_pairs(num_first, num_second, budget):
        assert end - start + until - begin <= budget
        seen[start:end, begin:until] = True
    assert seen.all()


def test_masks_are_drawn_by_pair_and_never_on_boundaries() -> None:
    generator = np.random.default_rng(1)
    proteins = [generator.integers(4, 24, 400).astype(np.uint8) for _ in range(6)]
    readings = [Reading(proteins[place], proteins[place + 1], place // 2, place) for place in (0, 2, 4)]
    whole = gather_pairs(ESM, readings, [0, 0, 0], 0.15, 11)
    clean = pack_pairs(ESM, [(one.first, one.second) for one in readings])
    assert whole.row.is_residue[whole.masked].all()
    assert torch.equal(whole.truth, clean.tokens[whole.masked])
    untouched = torch.ones(len(clean.tokens), dtype=torch.bool)
    untouched[whole.masked] = False
    assert torch.equal(whole.row.tokens[untouched], clean.tokens[untouched])
    assert len(whole.masked) / 2400 == pytest.approx(0.15, abs=0.03)
    is_mask = (whole.row.tokens[whole.masked] == ESM.mask).float().mean()
    assert float(is_mask) == pytest.approx(0.8, abs=0.06)
    alone = gather_pairs(ESM, [readings[1]], [0], 0.15, 11)  # the same whatever else is in the row
    assert torch.equal(alone.row.tokens, whole.row.tokens.split(whole.row.lengths)[1])
    other = gather_pairs(ESM, readings, [0, 0, 0], 0.15, 12)
    assert not torch.equal(other.masked, whole.masked)
