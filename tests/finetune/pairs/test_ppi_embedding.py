"""Pairs from embeddings: vectors against transformers, the scorer against its plain form, and a run end to end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megaprot.common.errors import RunError
from megaprot.finetune import evaluate
from megaprot.finetune.batch import Batch
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.model_folder import read_model
from megaprot.finetune.pairs.embedding_scorer import PairScorer
from megaprot.finetune.pairs.files import read_pairs
from megaprot.finetune.pairs.protein_vectors import FeatureTable, encode_proteins, feature_layers, num_features
from megaprot.pretrain import parallel
from megaprot.tools import cli
from tests.finetune.folders import esm_folder, hidden_alone, random_proteins, residue_ids
from tests.finetune.pairs.pair_data import pair_folder

LENGTHS = (9, 40, 23, 40, 5)
RUN = ["--train.num_epochs", "25", "--train.batch_size", "32", "--train.eval_interval", "40", "--optim.lr", "2e-3",
       "--head.hidden_size", "32", "--tuning.mode", "frozen"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return esm_folder(tmp_path_factory.mktemp("embedding") / "esm", token_dropout=False)


@pytest.fixture(scope="module")
def run(model: Path) -> Iterator[tuple[Path, Path]]:
    """A model of a short run, and its data."""
    if dist.is_initialized():
        parallel.stop_processes()
    data = pair_folder(model.parent / "data", {"train": 300, "valid": 80, "test": 60}, num_proteins=30)
    output = model.parent / "run"
    arguments = ["--task", "ppi_embedding", "--model", str(model), "--data", str(data), "--output", str(output)]
    assert cli.main(["finetune", *arguments, *RUN]) == 0
    yield output, data


def scorer_of(num_features: int = 24, seed: int = 1) -> PairScorer:
    torch.manual_seed(seed)
    scorer = PairScorer(num_features, 16, 0.1).eval()
    scorer.standardise(torch.randn(50, num_features))
    return scorer


def test_vectors_are_means_of_transformers_states(model: Path) -> None:
    encoder, proteins = load_encoder(model), random_proteins(LENGTHS)
    found = encode_proteins(encoder, residue_ids(encoder, proteins), max_tokens=60)
    assert feature_layers(encoder) == (0, 1, 2, -1)
    assert found.shape == (5, num_features(encoder))
    for protein, vector in zip(proteins, found, strict=True):
        states = hidden_alone(model, protein.decode())
        expected = [states[layer][1:-1].mean(0) for layer in (0, 1, 2, 3)]
        expected.append(torch.tensor([float(np.log(len(protein)))]))
        assert torch.allclose(vector, torch.cat(expected), atol=1e-5)


def test_a_protein_that_is_too_long_is_the_mean_of_its_stretches(model: Path) -> None:
    encoder = load_encoder(model)
    protein = random_proteins([23])[0]
    found = encode_proteins(encoder, residue_ids(encoder, [protein]), longest=8)[0]
    spans = [(0, 7), (7, 15), (15, 23)]
    parts = encode_proteins(encoder, residue_ids(encoder, [protein[start:end] for start, end in spans]))
    expected = sum(part[:-1] * (end - start) for part, (start, end) in zip(parts, spans, strict=True)) / 23
    assert torch.allclose(found[:-1], expected, atol=1e-6)
    assert found[-1] == pytest.approx(np.log(23))


def test_each_protein_is_encoded_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, table = load_encoder(model), FeatureTable()
    proteins = residue_ids(encoder, random_proteins(LENGTHS))
    read: list[int] = []
    forward = Encoder.forward

    def counting(self: Encoder, batch: Batch, *arguments: Any) -> Any:
        read.append(batch.num_sequences)
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Encoder, "forward", counting)
    for members in ((0, 1), (1, 0, 2), (0, 1, 2), (3, 4)):
        for member in members:
            table.index.number(proteins[member].copy())  # another array, the same protein
        vectors = table.fill(encoder)
        assert len(vectors) == max(members) + 1
    assert sum(read) == 5
    assert torch.allclose(vectors, encode_proteins(encoder, proteins), atol=1e-6)


def test_values_that_are_not_finite_end_the_run(model: Path) -> None:
    encoder = load_encoder(model)
    with torch.no_grad():
        encoder.model.base_model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        encode_proteins(encoder, residue_ids(encoder, random_proteins([8])))


def test_the_scorer_is_what_its_formula_says() -> None:
    scorer, vectors = scorer_of(), torch.randn(2, 24)
    standard = (vectors - scorer.mean) / scorer.spread
    a, b = scorer.project(standard)
    inner = scorer.of_sum(a) + scorer.of_sum(b) + scorer.of_difference((a - b).abs()) + scorer.of_product(a * b)
    factors = scorer.factor.weight
    bilinear = a @ factors.T @ torch.diag(scorer.scales) @ factors @ b
    expected = scorer.out(torch.nn.functional.gelu(inner)).squeeze() + bilinear
    assert scorer(vectors[:1], vectors[1:])[0].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("num_columns", [1, 7, 2100])
def test_blocks_are_the_scores_of_their_pairs(num_columns: int) -> None:
    scorer = scorer_of()
    rows, columns = torch.randn(5, 24), torch.randn(num_columns, 24)
    found = scorer.block(scorer.parts(rows), scorer.parts(columns))
    for row in range(5):
        expected = scorer(rows[row].expand(num_columns, -1), columns)
        assert torch.allclose(found[row], expected, atol=2e-5)


def test_scores_depend_on_neither_order_nor_neighbours() -> None:
    scorer, first, second = scorer_of(), torch.randn(300, 24), torch.randn(300, 24)
    together = scorer(first, second)
    assert (together - scorer(second, first)).abs().max() < 1e-6
    alone = torch.cat([scorer(first[place : place + 1], second[place : place + 1]) for place in range(20)])
    assert (together[:20] - alone).abs().max() < 1e-5


def test_a_run_learns_and_reports_baselines_and_leakage(run: tuple[Path, Path]) -> None:
    output, data = run
    assert cli.main(["evaluate", "--task", "ppi_embedding", "--model", str(output), "--data", str(data)]) == 0
    found = json.loads((output / "evaluation_test" / "results.json").read_text())
    assert found["metrics"]["aupr"]["value"] > 0.8
    assert found["baselines"].keys() == {"degree", "kmer"}
    assert found["baselines"]["kmer"]["aupr"]["low"] > 0.5
    assert found["leakage"]["train"]["num_shared_proteins"] > 0
    assert found["leakage"]["pretraining"] == "Not recorded."
    assert found["metrics"].keys() <= found["definitions"].keys()
    page = (output / "evaluation_test" / "report.html").read_text()
    for part in ("Beside baselines", "Leakage", "Reliability", "Precision and recall", "over 60 pairs"):
        assert part in page


def test_one_model_is_measured_on_several_sets(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, data = run
    reads: list[Path] = []

    def told(path: Path, *more: Any) -> Any:
        reads.append(path)
        return read_model(path, *more)

    monkeypatch.setattr(evaluate, "read_model", told)
    arguments = ["--task", "ppi_embedding", "--model", str(output), "--data", str(data), "--output", str(tmp_path)]
    assert cli.main(["evaluate", *arguments, "--split", "valid,test"]) == 0
    assert reads == [output / "best"]
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("valid", "test")]
    assert [one["num_examples"] for one in found] == [80, 60]
    assert found[0]["leakage"]["not_compared"] == {"valid": "it is what is measured"}
    assert found[1]["leakage"]["not_compared"] == {}
    assert cli.main(["evaluate", *arguments, "--split", "test,yeast"]) == 2


def test_the_written_model_scores_as_its_parts_do(run: tuple[Path, Path], model: Path) -> None:
    output, data = run
    tuned = read_model(output)
    task: Any = tuned.task
    pairs = read_pairs(data, "test", tuned.encoder.vocabulary)
    with torch.no_grad():
        logits = tuned.model(task.collate(tuned.encoder, pairs, None))
        proteins = [encode_proteins(load_encoder(model), [one.residues_first, one.residues_second]) for one in pairs]
        head: Any = tuned.model.head
        expected = torch.cat([head(vectors[:1], vectors[1:]) for vectors in proteins])
    assert torch.allclose(logits, expected, atol=1e-4)
    outcome = task.outcomes(logits, pairs)[0]
    name, chance = next(iter(task.rows(pairs[0], outcome)))
    assert name == pairs[0].second
    assert float(chance) == pytest.approx(1 / (1 + np.exp(-logits[0].item() / task.temperature)), abs=1e-4)
    assert (tuned.encoder.training, head.training) == (False, False)


def test_a_model_whose_training_data_is_gone_still_reports(run: tuple[Path, Path], tmp_path: Path) -> None:
    output, data = run
    moved = json.loads((output / "best" / "task.json").read_text())
    moved["learned"]["training_data"] = str(tmp_path / "gone")
    tuned = read_model(output)
    task: Any = tuned.task
    task.restore(moved["learned"])
    pairs = task.read(data, "test", tuned.encoder.vocabulary)
    with torch.no_grad():
        outcomes = task.outcomes(tuned.model(task.collate(tuned.encoder, pairs, None)), pairs)
    baselines, leakage = task.sections(pairs, outcomes)
    assert baselines.numbers["degree"]["aupr"]["value"] > 0  # counts travel with the model
    assert set(leakage.numbers["not_compared"]) == {"train", "valid"}


def test_a_model_that_does_not_know_its_training_data_is_compared_with_none(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, data = run
    tuned = read_model(output)
    task: Any = tuned.task
    task.restore(task.state() | {"training_data": ""})
    pairs = task.read(data, "test", tuned.encoder.vocabulary)
    monkeypatch.chdir(data)  # whose train.tsv is not known to be the model's
    with torch.no_grad():
        outcomes = task.outcomes(tuned.model(task.collate(tuned.encoder, pairs, None)), pairs)
    why = "the model does not say where it is"
    assert task.sections(pairs, outcomes)[1].numbers["not_compared"] == {"train": why, "valid": why}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tuning.mode", "full"], "give --tuning.mode frozen"),
        (["--engine.zero_stage", "3"], "give 0"),
        (["--head.name", "interaction"], "has the heads symmetric"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    flags: list[str],
    words: str,
    run: tuple[Path, Path],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--task", "ppi_embedding", "--model", str(model), "--data", str(run[1])]
    assert cli.main(["finetune", *arguments, "--output", str(tmp_path / "x"), "--tuning.mode", "frozen", *flags]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert words in captured[-1]
    assert not (tmp_path / "x").exists()
