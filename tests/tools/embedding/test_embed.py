"""`megaprot embed` against transformers one protein at a time, in all its forms, and what it says to wrong input."""

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from megaprot.common import sentencepiece_model
from megaprot.common.vocabulary import get_vocabulary
from megaprot.tools.conversion.tokenizer import write_tokenizer
from tests.finetune.folders import bert_folder, esm_folder, hidden_alone, megatron_bert_folder, random_proteins
from tests.tools.embedding.runs import (
    assert_close,
    embed,
    expected_means,
    read_hdf5,
    refused,
    windowed,
    write_fasta,
)

LENGTHS = [30, 5, 41, 30, 1, 60]
NAMES = ["P12345", "A0A024", "Q9Y261-2", "plain", "one", "last"]
PROTEINS = dict(zip(NAMES, random_proteins(LENGTHS), strict=True))
HEADERS = ["sp|P12345|NAME_HUMAN", "tr|A0A024|OTHER", "sp|Q9Y261-2|ISOFORM", "plain", "one", "last"]


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return esm_folder(tmp_path_factory.mktemp("model") / "esm")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = dict(zip(HEADERS, PROTEINS.values(), strict=True))
    return write_fasta(tmp_path_factory.mktemp("input") / "proteins.fasta", named)


def test_means_are_keyed_by_accession(
    esm: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "vectors.h5"
    assert embed(esm, fasta, output) == 0
    assert_close(read_hdf5(output), expected_means(esm, PROTEINS))
    with h5py.File(output) as file:
        assert file["P12345"].attrs["original_id"] == "sp|P12345|NAME_HUMAN"
        assert json.loads(file.attrs["layer"]) == [-1]
        assert json.loads(file.attrs["model"]) == "esm"
    said = capsys.readouterr()
    assert "6 proteins, 167 residues" in said.out
    assert "padding-free" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vectors.h5"]


def test_vectors_by_residue_of_several_layers_in_half_precision(esm: Path, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.h5"
    assert embed(esm, fasta, output, "--per_residue", "true", "--layer", "0", "2", "--dtype", "fp16") == 0
    found = read_hdf5(output)
    for name, protein in PROTEINS.items():
        states = hidden_alone(esm, protein.decode())
        expected = np.stack([states[layer][1:-1].numpy() for layer in (0, 2)])
        assert found[name].dtype == np.float16
        assert found[name].shape == (2, len(protein), 32)
        np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("layer", ["-2", "3"])
def test_one_layer(layer: str, esm: Path, fasta: Path, tmp_path: Path) -> None:
    assert embed(esm, fasta, tmp_path / "vectors.h5", "--layer", layer) == 0
    assert_close(read_hdf5(tmp_path / "vectors.h5"), expected_means(esm, PROTEINS, int(layer)))


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_other_formats_hold_the_same(ending: str, esm: Path, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / f"vectors{ending}"
    assert embed(esm, fasta, output, "--max_tokens", "64") == 0
    found = dict(np.load(output)) if ending == ".npz" else load_file(output)
    assert found.keys() == PROTEINS.keys()
    assert_close({name: found[name] for name in PROTEINS}, expected_means(esm, PROTEINS))


def test_compressed_input_and_tables(esm: Path, fasta: Path, tmp_path: Path) -> None:
    packed = tmp_path / "proteins.fasta.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    table = tmp_path / "proteins.csv"
    rows = [f"{name},{protein.decode()}" for name, protein in PROTEINS.items()]
    table.write_text("\n".join(["accession,sequence", *rows]) + "\n")
    assert embed(esm, packed, tmp_path / "a.h5") == 0
    assert embed(esm, table, tmp_path / "b.h5", "--columns.identifier", "accession") == 0
    expected = expected_means(esm, PROTEINS)
    assert_close(read_hdf5(tmp_path / "a.h5"), expected)
    assert_close(read_hdf5(tmp_path / "b.h5"), expected)


def test_protbert_gets_spaces_and_x_for_rare_residues(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    source = write_fasta(tmp_path / "rare.fasta", {"rare": "MKUVZOLAB", "lower": "mkvla"})
    assert embed(folder, source, tmp_path / "vectors.h5") == 0
    known = {"rare": b"MKXVXXLAX", "lower": b"MKVLA"}
    assert_close(read_hdf5(tmp_path / "vectors.h5"), expected_means(folder, known, with_spaces=True))


def test_a_vocabulary_of_pieces_gives_means_over_pieces_and_no_vectors_by_residue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trained.model").write_bytes(
        sentencepiece_model.train([b.decode() for b in random_proteins([99] * 50)], 200)
    )
    vocabulary = get_vocabulary(str(tmp_path / "trained.model"))
    ids = {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad, "mask_token_id": vocabulary.mask}
    folder = esm_folder(tmp_path / "esm", **ids)
    (folder / "vocab.txt").unlink()
    write_tokenizer(vocabulary, folder, 0)
    proteins = dict(zip("abc", random_proteins([40, 7, 19]), strict=True))
    source = write_fasta(tmp_path / "proteins.fasta", proteins)
    assert embed(folder, source, tmp_path / "vectors.h5") == 0
    expected = expected_means(folder, proteins)
    assert_close(read_hdf5(tmp_path / "vectors.h5"), expected)
    assert len(hidden_alone(folder, proteins["a"].decode())[-1]) < 40, "pieces must be longer than residues"
    said = refused(capsys, folder, source, tmp_path / "more.h5", "--per_residue", "true")
    assert "one token a residue" in said


@pytest.mark.parametrize("per_residue", ["false", "true"])
def test_long_proteins_are_read_in_windows(
    per_residue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bert_folder(tmp_path / "bert")  # 62 residues at most
    long, short = random_proteins([150, 20])
    source = write_fasta(tmp_path / "long.fasta", {"long": long, "short": short})
    assert embed(folder, source, tmp_path / "vectors.h5", "--per_residue", per_residue) == 0
    expected = windowed(folder, long, [(0, 62), (47, 109), (88, 150)])
    found = read_hdf5(tmp_path / "vectors.h5")["long"]
    wanted = expected if per_residue == "true" else expected.mean(dim=0)
    assert np.abs(found - wanted.numpy()).max() < 1e-5
    assert "longer than the model's 62 residues, read in windows" in capsys.readouterr().err


def test_a_class_that_runs_padded_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = megatron_bert_folder(tmp_path / "megatron")
    proteins = dict(zip("abc", random_proteins([30, 7, 19]), strict=True))
    source = write_fasta(tmp_path / "proteins.fasta", proteins)
    assert embed(folder, source, tmp_path / "vectors.h5", "--per_residue", "true") == 0
    found = read_hdf5(tmp_path / "vectors.h5")
    for name, protein in proteins.items():
        expected = hidden_alone(folder, protein.decode())[-1][1:].numpy()  # no end token
        assert np.abs(found[name] - expected).max() < 1e-5
    assert "padded batches" in capsys.readouterr().err


def test_cutting_is_done_when_asked_and_counted(
    esm: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(esm, fasta, tmp_path / "vectors.h5", "--max_length", "30") == 0
    cut = {name: protein[:30] for name, protein in PROTEINS.items()}
    assert_close(read_hdf5(tmp_path / "vectors.h5"), expected_means(esm, cut))
    assert "proteins cut, as --max_length says: 2" in capsys.readouterr().err


def test_further_proteins_of_a_key_are_left_out_and_named(
    esm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = random_proteins([10, 12])
    source = write_fasta(tmp_path / "twice.fasta", {"sp|P12345|A": first, "tr|P12345|B": second, "a/b": second})
    assert embed(esm, source, tmp_path / "vectors.h5") == 0
    assert_close(read_hdf5(tmp_path / "vectors.h5"), expected_means(esm, {"P12345": first, "a_b": second}))
    assert f"P12345 ({source}:3)" in capsys.readouterr().err


def test_bad_records_stop_or_are_skipped_as_asked(
    esm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_fasta(tmp_path / "bad.fasta", {"good": "MKVLA", "bad": "MK7", "unknown": "JJJJ"})
    said = refused(capsys, esm, source, tmp_path / "vectors.h5")
    assert f"{source}:3" in said
    assert embed(esm, source, tmp_path / "vectors.h5", "--on_bad_record", "skip") == 0
    assert list(read_hdf5(tmp_path / "vectors.h5")) == ["good"]
    said = capsys.readouterr().err
    assert "2 bad records skipped" in said
    assert "unknown tokens for the most part" in said


def test_wrong_input_is_refused_in_one_sentence(
    esm: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "vectors.h5"
    existing = tmp_path / "there.h5"
    existing.write_bytes(b"mine")
    empty = tmp_path / "empty.fasta"
    empty.write_text("")
    assert "has no config.json" in refused(capsys, tmp_path, fasta, output)
    assert "is missing" in refused(capsys, esm, tmp_path / "nothing.fasta", output)
    assert "empty" in refused(capsys, esm, empty, output)
    assert "must end with" in refused(capsys, esm, fasta, tmp_path / "vectors.txt")
    assert "exists" in refused(capsys, esm, fasta, existing)
    assert "folder does not exist" in refused(capsys, esm, fasta, tmp_path / "no" / "vectors.h5")
    assert "0 to 3" in refused(capsys, esm, fasta, output, "--layer", "4")
    assert "0 to 3" in refused(capsys, esm, fasta, output, "--layer=-5")
    assert "0 or more" in refused(capsys, esm, fasta, output, "--max_length", "-1")
    assert "did you mean" in refused(capsys, esm, fasta, output, "--per_residu", "true")
    assert "read twice" in refused(capsys, esm, Path("-"), output)
    assert existing.read_bytes() == b"mine"


def test_values_that_do_not_fit_half_precision_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = esm_folder(tmp_path / "esm")
    weights = load_file(folder / "model.safetensors")
    weights["esm.encoder.emb_layer_norm_after.bias"][:] = 1e6
    from safetensors.numpy import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    source = write_fasta(tmp_path / "one.fasta", {"one": "MKVLA"})
    assert embed(folder, source, tmp_path / "vectors.h5", "--dtype", "fp16") == 1
    assert "--dtype fp32" in capsys.readouterr().err
    assert not (tmp_path / "vectors.h5").exists()
