"""Prediction over pairs and proteomes against plain enumeration; restarts, several processes, bad input."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import write_json_atomically
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.model_folder import read_model, write_model
from megaprot.finetune.pairs import jobs as pair_jobs
from megaprot.finetune.pairs import prediction as pair_prediction
from megaprot.finetune.pairs import scoring as pair_scoring
from megaprot.finetune.pairs.files import PairExample, sequence_name
from megaprot.finetune.pairs.jobs import PairRequest
from megaprot.finetune.pairs.prediction import predict_pairs
from megaprot.finetune.pairs.scoring import PairScoring
from megaprot.finetune.pairs.screening import Screen, blocks_of, kept_of
from megaprot.finetune.processes import Place
from megaprot.finetune.tasks import open_task
from megaprot.pretrain import parallel
from megaprot.tools import cli
from tests.finetune.folders import esm_folder, random_proteins

NUM_PROTEINS = 11
SEQUENCES = random_proteins([5 + 3 * number for number in range(NUM_PROTEINS)])
PROTEINS = {f"P{number:02d}": text for number, text in enumerate(SEQUENCES)}
NAMES = list(PROTEINS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, place: Place) -> dict[str, Path]:
    """Models with random heads of both kinds."""
    folder = tmp_path_factory.mktemp("models")
    source = esm_folder(folder / "esm")
    found = {}
    for name in ("ppi", "ppi_embedding"):
        config = FinetuneConfig(name, str(source), "data", "output", head=HeadConfig(hidden_size=8))
        config.tuning.mode, config.ppi.mlm_weight = "frozen", 0.0
        task, encoder = open_task(name, LabelConfig()), load_encoder(source)
        task.configure(config)
        task.temperature, task.pos_weight = 1.7, 1.0  # type: ignore[attr-defined]
        torch.manual_seed(3)
        head: Any = task.build_head(config.head, encoder)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.4)
        if name == "ppi_embedding":
            head.spread.fill_(1.0)
        found[name] = folder / name / "best"
        found[name].parent.mkdir()
        write_model(found[name], task.build_model(encoder, head, True), task, config.head, source, {}, place)
    return found


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return written(tmp_path / "all.fasta", NAMES)


def written(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f">{name}\n{PROTEINS[name].decode()}\n" for name in names))
    return path


def table(path: Path) -> list[tuple[str, str, float]]:
    header, *lines = path.read_text().splitlines()
    assert header == "first\tsecond\tprobability"
    return [(one, other, float(chance)) for one, other, chance in (line.split("\t") for line in lines)]


def chances(model: Path) -> dict[tuple[str, str], float]:
    """Probabilities of all ordered pairs, one after another."""
    tuned = read_model(model)
    task: Any = tuned.task
    found = {}
    ids = {name: task_ids(tuned, text) for name, text in PROTEINS.items()}
    for one in NAMES:
        for other in NAMES:
            pair = PairExample(0, 0, one, other, ids[one], ids[other], -1)
            with torch.no_grad():
                outcome = task.outcomes(tuned.model(task.collate(tuned.encoder, [pair], None)), [pair])[0]
            found[one, other] = float(1 / (1 + np.exp(-outcome["logits"].mean() / 1.7)))
    return found


def task_ids(tuned: Any, text: bytes) -> NDArray[Any]:
    from megaprot.finetune.residues import encode

    return encode(tuned.encoder.vocabulary, text)


@pytest.mark.parametrize("name", ["ppi", "ppi_embedding"])
def test_pairs_of_a_file_are_scored_in_its_order(
    name: str, models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_jobs, "_MOST_LISTED", 7)
    random, expected = np.random.default_rng(0), chances(models[name])
    members = [tuple(random.choice(NAMES, 2, replace=False).tolist()) for _ in range(25)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{one}\t{other}\n" for one, other in members))
    output = tmp_path / "out.tsv"
    request = PairRequest(models[name], output, pairs=str(tmp_path / "pairs.tsv"), sequences=str(fasta))
    predict_pairs(request, place)
    found = table(output)
    assert [row[:2] for row in found] == members
    assert [row[2] for row in found] == pytest.approx([expected[pair] for pair in members], abs=2e-5)  # type: ignore[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.fasta", "out.tsv", "pairs.tsv"]


def test_a_csv_of_sequences_needs_no_fasta(models: dict[str, Path], tmp_path: Path, place: Place) -> None:
    first, second = PROTEINS["P01"].decode(), PROTEINS["P05"].decode()
    (tmp_path / "pairs.csv").write_text(f"query,text\n{first},{second}\n{second},{first}\n")
    output = tmp_path / "out.tsv"
    predict_pairs(PairRequest(models["ppi"], output, pairs=str(tmp_path / "pairs.csv")), place)
    found = table(output)
    assert found[0][:2] == (sequence_name(first.encode()), sequence_name(second.encode()))
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-6)  # both orders are averaged
    assert found[0][2] == pytest.approx(chances(models["ppi"])["P01", "P05"], abs=2e-5)


@pytest.mark.parametrize("name", ["ppi", "ppi_embedding"])
def test_all_pairs_of_a_proteome_above_a_threshold(
    name: str, models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (pair_scoring.CrossScoring, pair_scoring.EmbeddingScoring):
        monkeypatch.setattr(kind, "pairs_a_part", 25)  # two rows a part
    expected = chances(models[name])
    values = np.sort([*expected.values()])[30:-30]
    widest = int(np.argmax(np.diff(values)))
    threshold = float(values[widest] + values[widest + 1]) / 2  # so that rounding moves no pair over it
    output = tmp_path / "out.tsv"
    predict_pairs(PairRequest(models[name], output, all_vs_all=(str(fasta),), threshold=threshold), place)
    wanted = [(one, other) for place_one, one in enumerate(NAMES) for other in NAMES[place_one + 1 :]
              if expected[one, other] >= threshold]  # fmt: skip
    found = table(output)
    assert [row[:2] for row in found] == wanted
    assert [row[2] for row in found] == pytest.approx([expected[pair] for pair in wanted], abs=2e-5)
    predict_pairs(PairRequest(models[name], output, all_vs_all=(str(fasta),), threshold=0.0), place)
    assert len(table(output)) == NUM_PROTEINS * (NUM_PROTEINS - 1) // 2


@pytest.mark.parametrize("name", ["ppi", "ppi_embedding"])
def test_the_best_partners_of_each_protein(
    name: str, models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place
) -> None:
    expected = chances(models[name])
    output = tmp_path / "out.tsv"
    predict_pairs(PairRequest(models[name], output, all_vs_all=(str(fasta),), top_k=3), place)
    found = table(output)
    for number, one in enumerate(NAMES):
        best = sorted((other for other in NAMES if other != one), key=lambda other: -expected[one, other])[:3]
        assert [row[:2] for row in found[3 * number : 3 * number + 3]] == [(one, other) for other in best]


def test_two_proteomes_are_paired_with_each_other(models: dict[str, Path], tmp_path: Path, place: Place) -> None:
    ours, theirs = written(tmp_path / "x.fasta", NAMES[:4]), written(tmp_path / "y.fasta", NAMES[3:])
    expected, output = chances(models["ppi_embedding"]), tmp_path / "out.tsv"
    request = PairRequest(models["ppi_embedding"], output, all_vs_all=(str(ours), str(theirs)), threshold=0.0)
    predict_pairs(request, place)
    assert [row[:2] for row in table(output)] == [(one, other) for one in NAMES[:4] for other in NAMES[3:]]
    assert [row[2] for row in table(output)] == pytest.approx(
        [expected[one, other] for one in NAMES[:4] for other in NAMES[3:]], abs=2e-5
    )
    predict_pairs(replace(request, top_k=2, threshold=0.2), place)
    for number, one in enumerate(NAMES[:4]):
        allowed = [other for other in NAMES[3:] if expected[one, other] >= 0.2]
        best = sorted(allowed, key=lambda other: -expected[one, other])[:2]
        assert [row[1] for row in table(output) if row[0] == NAMES[number]] == best


class Fixed(PairScoring):
    """Logits from a matrix."""

    pairs_a_part = 10

    def __init__(self, logits: NDArray[Any]) -> None:
        self.logits = logits.astype(np.float32)

    def pairs(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.logits[places[:, 0], places[:, 1]].astype(float)

    def block(self, rows: NDArray[np.int64], columns: NDArray[np.int64], is_wanted: NDArray[np.bool_]) -> NDArray[Any]:
        found: NDArray[Any] = np.where(is_wanted, self.logits[np.ix_(rows, columns)], np.nan)
        return found


def test_ties_go_to_the_protein_that_stands_first() -> None:
    logits = np.array([[0, 1, 1, 1, 0], [1, 0, 2, 1, 1], [1, 2, 0, 0, 0], [1, 1, 0, 0, 3], [0, 1, 0, 3, 0]])
    screen = Screen(5, 5, True, 2, -np.inf)
    kept = [kept_of(Fixed(logits), screen, rows) for rows in blocks_of(screen, 10)]
    assert len(kept) == 3
    pairs = [(row, column) for rows, columns, _ in kept for row, column in zip(rows, columns, strict=True)]
    assert pairs == [(0, 1), (0, 2), (1, 2), (1, 0), (2, 1), (2, 0), (3, 4), (3, 0), (4, 3), (4, 1)]


def test_scores_that_are_not_finite_end_the_run() -> None:
    screen = Screen(3, 3, True, 0, 0.0)
    logits = np.zeros((3, 3))
    logits[0, 2] = np.nan
    with pytest.raises(RunError, match="not finite"):
        kept_of(Fixed(logits), screen, range(3))


@pytest.mark.parametrize("name", ["ppi", "ppi_embedding"])
def test_a_killed_run_goes_on_with_what_is_missing(
    name: str, models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (pair_scoring.CrossScoring, pair_scoring.EmbeddingScoring):
        monkeypatch.setattr(kind, "pairs_a_part", 25)
    monkeypatch.setattr(pair_scoring, "_GROUP", 4)
    request = PairRequest(models[name], tmp_path / "whole.tsv", all_vs_all=(str(fasta),), top_k=4)
    predict_pairs(request, place)
    request = replace(request, output=tmp_path / "out.tsv")
    lines, encode = pair_jobs.ScreenJob.lines, pair_scoring.encode_proteins
    scored: list[range] = []
    num_encoded: list[int] = []

    def failing(last: int) -> Callable[..., bytes]:
        def told(self: Any, scoring: PairScoring, part: range) -> bytes:
            if part.start == last:
                raise KeyboardInterrupt
            scored.append(part)
            return lines(self, scoring, part)

        return told

    monkeypatch.setattr(pair_scoring, "encode_proteins",
                        lambda *given: (num_encoded.append(len(given[1])), encode(*given))[1])  # fmt: skip
    monkeypatch.setattr(pair_jobs.ScreenJob, "lines", failing(6))
    with pytest.raises(KeyboardInterrupt):
        predict_pairs(request, place)
    assert not request.output.exists()
    with pytest.raises(InputError, match="begun with top_k 4, not 5"):
        predict_pairs(replace(request, top_k=5), place)
    monkeypatch.setattr(pair_jobs.ScreenJob, "lines", failing(-1))
    predict_pairs(request, place)
    assert [part.start for part in scored] == [0, 2, 4, 6, 8, 10]  # each once
    assert sum(num_encoded) == (0 if name == "ppi" else NUM_PROTEINS)
    assert request.output.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not (tmp_path / ".out.tsv.partial").exists()


@pytest.mark.parametrize("name", ["ppi", "ppi_embedding"])
def test_processes_write_the_same_bytes(
    name: str, models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes, one after another in this one, each with its share of proteins and parts."""
    for kind in (pair_scoring.CrossScoring, pair_scoring.EmbeddingScoring):
        monkeypatch.setattr(kind, "pairs_a_part", 25)
    monkeypatch.setattr(pair_scoring, "_GROUP", 4)
    request = PairRequest(models[name], tmp_path / "one.tsv", all_vs_all=(str(fasta),), threshold=0.3)
    predict_pairs(request, place)
    request = replace(request, output=tmp_path / "three.tsv")
    monkeypatch.setattr(Place, "barrier", lambda self: None)
    monkeypatch.setattr(pair_prediction, "_join", lambda *given: 0)
    tuned = read_model(request.model)
    folder = tmp_path / ".three.tsv.partial"
    folder.mkdir()
    write_json_atomically(folder / "settings.json", pair_jobs.open_job(request, tuned).settings)
    others = [Place(rank, 3, place.device) for rank in (1, 2)]
    for rank in (*others, Place(0, 3, place.device)):
        monkeypatch.setattr(pair_scoring, "_read_parts", lambda *given: None)
        job = pair_jobs.open_job(request, tuned)
        pair_scoring.open_scoring(tuned, job.proteins, folder, rank, 0, lambda _: None)
    monkeypatch.undo()
    monkeypatch.setattr(Place, "barrier", lambda self: None)
    monkeypatch.setattr(pair_scoring, "_GROUP", 4)
    for kind in (pair_scoring.CrossScoring, pair_scoring.EmbeddingScoring):
        monkeypatch.setattr(kind, "pairs_a_part", 25)
    for rank in (*others, Place(0, 3, place.device)):
        before = len(list(folder.glob("pairs-*")))
        predict_pairs(request, rank)
        if folder.exists():
            assert len(list(folder.glob("pairs-*"))) - before == 2  # of six parts
    assert (tmp_path / "three.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()


def test_a_folder_that_is_encoder_and_model_at_once_scores(
    models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place
) -> None:
    """As PLM-interact's weights are converted."""
    folder = tmp_path / "plm"
    shutil.copytree(models["ppi"] / "encoder", folder)
    shutil.copy(models["ppi"] / "head.safetensors", folder)
    description = json.loads((models["ppi"] / "task.json").read_text()) | {"encoder": "."}
    (folder / "task.json").write_text(json.dumps(description))
    request = PairRequest(folder, tmp_path / "out.tsv", all_vs_all=(str(fasta),), top_k=1)
    predict_pairs(request, place)
    predict_pairs(replace(request, model=models["ppi"], output=tmp_path / "same.tsv"), place)
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "same.tsv").read_bytes()


def test_one_order_differs_from_both(models: dict[str, Path], fasta: Path, tmp_path: Path, place: Place) -> None:
    (tmp_path / "pairs.tsv").write_text("P01\tP07\nP07\tP01\n")
    request = PairRequest(models["ppi"], tmp_path / "out.tsv", pairs=str(tmp_path / "pairs.tsv"), sequences=str(fasta))
    predict_pairs(replace(request, symmetric=False), place)
    first, second = (row[2] for row in table(request.output))
    assert abs(first - second) > 1e-3
    predict_pairs(request, place)
    both = [row[2] for row in table(request.output)]
    assert both[0] == pytest.approx(both[1], abs=1e-6)
    logits = [np.log(chance / (1 - chance)) for chance in (first, second, both[0])]
    assert logits[2] == pytest.approx((logits[0] + logits[1]) / 2, abs=1e-3)


BAD = [
    (["--pairs", "FOLDER/pairs.tsv"], "give --sequences"),
    (["--pairs", "FOLDER/unknown.tsv", "--sequences", "FASTA"], "unknown.tsv:2: Q9 has no sequence in"),
    (["--pairs", "FOLDER/self.tsv", "--sequences", "FASTA"], "self.tsv:1: pairs P01 with itself"),
    (["--pairs", "FOLDER/empty.tsv", "--sequences", "FASTA"], "holds no pair"),
    (["--pairs", "FOLDER/pairs.tsv", "--sequences", "FOLDER/cut.fasta"], "cut.fasta"),
    (["--pairs", "FOLDER/pairs.tsv", "--sequences", "FASTA", "--top_k", "3"], "are for --all_vs_all"),
    (["--pairs", "FOLDER/gone.tsv", "--sequences", "FASTA"], "is no file"),
    (["--sequences", "FASTA"], "name a file of pairs"),
    (["--all_vs_all", "[FASTA]"], "give --top_k, or --threshold"),
    (["--all_vs_all", "[FASTA,FASTA,FASTA]", "--top_k", "3"], "give one or two"),
    (["--all_vs_all", "[FASTA]", "--threshold", "1.5"], "at most 1"),
    (["--all_vs_all", "[FASTA]", "--pairs", "FOLDER/pairs.tsv", "--top_k", "3"], "give one of them"),
    (["--all_vs_all", "[FASTA]", "--input", "FASTA", "--top_k", "3"], "give one of --input, --pairs and --all_vs_all"),
    (["--input", "FASTA"], "give --pairs or --all_vs_all"),
    (["--input", "FASTA", "--threshold", "0.5"], "go with --pairs and --all_vs_all; leave them out"),
    (["--all_vs_all", "[FASTA]", "--top_k", "3", "--terms", "all"], "go with --input and a model of protein function"),
    ([], "give one of --input, --pairs and --all_vs_all"),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_one_sentence(
    flags: list[str],
    words: str,
    models: dict[str, Path],
    fasta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pairs.tsv").write_text("P01\tP07\n")
    (tmp_path / "unknown.tsv").write_text("P01\tP07\nP01\tQ9\n")
    (tmp_path / "self.tsv").write_text("P01\tP01\n")
    (tmp_path / "empty.tsv").write_text("\n")
    (tmp_path / "cut.fasta").write_text(">P01\nMKV\n>P07\n")
    flags = [flag.replace("FOLDER", str(tmp_path)).replace("FASTA", str(fasta)) for flag in flags]
    arguments = ["--model", str(models["ppi_embedding"].parent), "--output", str(tmp_path / "out.tsv"), *flags]
    if dist.is_initialized():
        parallel.stop_processes()
    assert cli.main(["predict", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out.tsv").exists()


def test_the_command_reads_lists_of_files(models: dict[str, Path], fasta: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other.fasta", NAMES[:2])
    if dist.is_initialized():
        parallel.stop_processes()
    output = tmp_path / "out.tsv"
    arguments = ["--model", str(models["ppi_embedding"].parent), "--output", str(output), "--top-k", "1"]
    assert cli.main(["predict", *arguments, "--all-vs-all", str(fasta), str(other)]) == 0
    assert [row[0] for row in table(output)] == NAMES
    assert json.loads((models["ppi_embedding"] / "task.json").read_text())["task"] == "ppi_embedding"
