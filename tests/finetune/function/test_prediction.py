"""``megaprot predict`` with a model of protein function: tables, CAFA's format, free text, what stands for no term."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns
from megaprot.common.stopping import StopRequest
from megaprot.finetune.examples import read_unlabelled
from megaprot.finetune.function import prediction
from megaprot.finetune.function.prediction import FunctionRequest, check_request, predict
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.model_folder import FinetunedModel, read_model
from megaprot.finetune.processes import Place, processes
from megaprot.finetune.splits import prepare
from megaprot.finetune.training import Run, train
from megaprot.pretrain import parallel
from megaprot.tools.cli import main
from tests.finetune.function.towers_data import config_of, inputs

ALONE = Place(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained model in ``out/last``, and what it was trained on."""
    if dist.is_initialized():
        parallel.stop_processes()
    folder = inputs(tmp_path_factory.mktemp("prediction"))
    config = config_of(folder)
    task, training, valid = prepare(config, load_encoder(folder / "model"))
    with processes(5.0) as place:
        train(Run(config, task, training, valid, place), StopRequest())
    for used in ("model", "text", "data/go-basic.obo"):  # predictions are made of the model's folder alone
        (folder / used).rename(folder / f"{used}.gone")
    yield folder


@pytest.fixture
def tuned(folder: Path) -> FinetunedModel:
    return read_model(folder / "out" / "last")


def predicted(folder: Path, tuned: FinetunedModel, output: Path, **request: Any) -> list[list[str]]:
    proteins = read_unlabelled(folder / "data" / "train_sequences.fasta", tuned.encoder.vocabulary, Columns())
    assert predict(tuned, proteins, output, FunctionRequest(**request), ALONE) == 60
    return [line.split("\t") for line in output.read_text().splitlines()]


def all_scores(folder: Path, tuned: FinetunedModel) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all proteins x terms, one protein at a time and without any blocks, and the terms."""
    task: Any = tuned.task
    model: Any = tuned.model
    terms = np.flatnonzero(~task.ontology.is_root)
    rows = []
    with torch.no_grad():
        vectors = model.project_terms(terms)
        for one in read_unlabelled(folder / "data" / "train_sequences.fasta", tuned.encoder.vocabulary, Columns()):
            part = task._part(tuned.encoder, [one])
            protein = model.head.project_proteins(model.protein_vectors(part))
            rows.append(torch.sigmoid(model.head.score(protein, vectors))[0].numpy())
    return task.ontology.make_consistent(np.stack(rows), terms), terms


def test_the_best_terms_of_each_protein_are_written_best_first(
    folder: Path, tuned: FinetunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, terms = all_scores(folder, tuned)
    monkeypatch.setattr(prediction, "CHUNK", 7)
    monkeypatch.setattr(prediction, "_PAIRS", 3 * len(terms))
    header, *rows = predicted(folder, tuned, tmp_path / "out.tsv", terms="all", top=4)
    assert header == ["identifier", "term", "name", "namespace", "score", "training_proteins"]
    assert [row[0] for row in rows] == [f"P{number:05d}" for number in range(60) for _ in range(4)]
    for number in range(60):
        own = rows[4 * number : 4 * number + 4]
        expected = np.sort(scores[number])[::-1][:4]
        np.testing.assert_allclose([float(row[4]) for row in own], expected, atol=1e-5)
        numbers = [tuned.task.ontology.numbers[row[1]] for row in own]  # type: ignore[attr-defined]
        np.testing.assert_allclose(scores[number][np.searchsorted(terms, numbers)], expected, atol=1e-5)


def test_without_a_list_the_terms_of_training_are_scored_but_no_roots(
    folder: Path, tuned: FinetunedModel, tmp_path: Path
) -> None:
    rows = predicted(folder, tuned, tmp_path / "out.tsv", top=100)[1:]
    trained = tuned.task.num_training  # type: ignore[attr-defined]
    roots = {"GO:0000001", "GO:0000002", "GO:0000003"}
    assert {row[1] for row in rows} == set(trained) - roots
    assert all(int(row[5]) == trained[row[1]] for row in rows)


def test_listed_terms_are_scored_and_others_reported(
    folder: Path, tuned: FinetunedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "terms.txt"
    listed.write_text("# mine\nGO:0000012 with a remark\n\nGO:0000001\nGO:7777777\nGO:0000099\n")
    rows = predicted(folder, tuned, tmp_path / "out.tsv", terms=str(listed))[1:]
    assert {row[1] for row in rows} == {"GO:0000012", "GO:0000001"}
    told = capsys.readouterr().err
    assert "1 terms are unknown to the ontology and left out, such as GO:7777777" in told
    assert "1 terms are obsolete and left out, such as GO:0000099" in told
    listed.write_text("GO:7777777\n")
    with pytest.raises(InputError, match="names no term"):
        predicted(folder, tuned, tmp_path / "out.tsv", terms=str(listed))
    with pytest.raises(InputError, match="cannot be read"):
        predicted(folder, tuned, tmp_path / "out.tsv", terms=str(tmp_path / "none"))


def test_cafa_has_three_columns_and_scores_above_zero_to_three_places(
    folder: Path, tuned: FinetunedModel, tmp_path: Path
) -> None:
    rows = predicted(folder, tuned, tmp_path / "out.tsv", cafa=True, top=3)
    assert len(rows) == 180
    for protein, term, score in rows:
        assert protein.startswith("P")
        assert term.startswith("GO:")
        assert 0 < float(score) <= 1
        assert len(score.partition(".")[2]) == 3


def test_free_text_is_scored_as_it_is_said(
    folder: Path, tuned: FinetunedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("binding of lipid", "transport\tof sugar", "membrane " * 60)
    rows = predicted(folder, tuned, tmp_path / "out.tsv", text=texts)[1:]
    assert len(rows) == 180
    assert {row[1] for row in rows} == {" ".join(text.split()) for text in texts}
    assert "longer than the 32 tokens" in capsys.readouterr().err


def test_vectors_of_terms_are_kept_and_made_again_where_they_do_not_fit(
    folder: Path, tuned: FinetunedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = predicted(folder, tuned, tmp_path / "first.tsv")
    kept = list((tuned.folder / "term_vectors").iterdir())
    calls: list[int] = []
    tuned.model.text.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, operator]
    assert predicted(folder, tuned, tmp_path / "second.tsv") == first
    assert not calls
    for path in kept:
        path.write_bytes(b"nonsense")
    assert predicted(folder, tuned, tmp_path / "third.tsv") == first
    assert "damaged" in capsys.readouterr().err


def test_a_bad_protein_leaves_no_table(folder: Path, tuned: FinetunedModel, tmp_path: Path) -> None:
    (tmp_path / "bad.fasta").write_text(">a\nMKV\n>b\nMK7V\n")
    proteins = read_unlabelled(tmp_path / "bad.fasta", tuned.encoder.vocabulary, Columns())
    with pytest.raises(InputError, match=r"bad\.fasta"):
        predict(tuned, proteins, tmp_path / "out.tsv", FunctionRequest(), ALONE)
    assert not (tmp_path / "out.tsv").exists()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (FunctionRequest(terms="all", text=("a",)), "one of them"),
        (FunctionRequest(text=("a",), cafa=True), "--cafa"),
        (FunctionRequest(text=(" ",)), "--text is empty"),
        (FunctionRequest(top=0), "--top is 0"),
        (FunctionRequest(top=2000, cafa=True), "at most 1,500"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_sentence(request_: FunctionRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_request(request_)


def test_the_command_line_takes_terms_texts_and_cafa(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.fasta").write_text(">a\nMKVLLA\n>b\nMKV\n")
    (tmp_path / "terms.txt").write_text("GO:0000012\n")
    common = ["predict", "--model", str(folder / "out"), "--input", str(tmp_path / "x.fasta"), "--output"]

    def written(*flags: str) -> list[list[str]]:
        assert main([*common, str(tmp_path / "out.tsv"), *flags]) == 0
        return [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]

    assert [row[0] for row in written("--top", "2")] == ["identifier", "a", "a", "b", "b"]
    assert [row[:2] for row in written("--terms", str(tmp_path / "terms.txt"))[1:]] == [
        ["a", "GO:0000012"], ["b", "GO:0000012"],
    ]  # fmt: skip
    assert {row[1] for row in written("--text", "binding of lipid", "transport")[1:]} == {
        "binding of lipid", "transport",
    }  # fmt: skip
    assert all(len(row) == 3 for row in written("--cafa", "--top", "3"))
    assert "out.tsv: function of 2 proteins" in capsys.readouterr().out
    (tmp_path / "x.fasta").write_text(">a\n\n>b\nMKV\n")
    assert main([*common, str(tmp_path / "none.tsv"), "--top", "2"]) == 2
    assert "record 'a' has no sequence; correct or remove it." in capsys.readouterr().err
    assert not (tmp_path / "none.tsv").exists()


def test_a_folder_without_its_ontology_is_damaged(folder: Path) -> None:
    path = folder / "out" / "best" / "ontology.json.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="ontology"):
        read_model(folder / "out" / "best")
