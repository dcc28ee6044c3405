"""`megaprot evaluate` against transformers' ESM sequence by sequence, and what it says to wrong input."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megaprot.common.packing import PackedRow
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain import parallel
from megaprot.pretrain.evaluation import add_tallies
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.step import Tally
from megaprot.pretrain.training import Training
from megaprot.tools import cli
from tests.pretrain.global_weights import load_global
from tests.pretrain.model.hf_weights import from_esm
from tests.pretrain.model.oracles import esm_for_masked_lm, logits_alone
from tests.pretrain.runs import begin, run, small_config, tally_by_hand, write_corpus
from tests.pretrain.tiny import world_of_one

NUMBERS = ["loss", "perplexity", "mask_perplexity", "masked_accuracy", "masked_positions"]


@pytest.fixture(scope="module")
def alone() -> Iterator[Place]:
    """A world of one for this module; that of earlier modules is not needed any more."""
    if dist.is_initialized():
        parallel.stop_processes()
    with world_of_one() as place:
        yield place


@pytest.fixture(autouse=True)
def processes_are_there(alone: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command run in this process's world instead of joining one."""

    @contextmanager
    def already(*_: Any) -> Iterator[Place]:
        yield alone

    monkeypatch.setattr(parallel, "processes", already)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, alone: Place) -> Training:
    """A run of two steps, saved after each."""
    folder = tmp_path_factory.mktemp("finished")
    train = {"num_steps": 2, "save_interval": 1, "eval_rows": 0}
    training = begin(small_config(write_corpus(folder / "corpus"), folder / "run", train=train), alone)
    run(training)
    return training


def evaluate(capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", "--model", str(model), "--data", str(data), *more]) == 0
    printed = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(printed[-1])
    return found


def refused(capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: str) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", "--model", str(model), "--data", str(data), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megaprot evaluate: error: ")
    assert error.count("\n") == 1
    return error


def sequences_of(row: PackedRow) -> list[list[int]]:
    bounds = row.cu_seqlens[: row.num_sequences + 1].tolist()
    return [row.tokens[start:end].tolist() for start, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("token_dropout", [False, True])
def test_numbers_are_those_of_transformers_esm_on_each_sequence_alone(
    token_dropout: bool, tmp_path: Path, alone: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    training = begin(small_config(corpus, tmp_path / "run", model={"token_dropout": token_dropout}), alone)
    model = training.config.model
    theirs = esm_for_masked_lm(model, num_positions=80)
    load_global(training.chunks[0].module, from_esm(theirs.state_dict(), model.num_attention_heads))
    training.save()

    stream, expected = training.validation, Tally()
    for row in map(stream.row, range(3)):
        logits = np.concatenate([part.numpy() for part in logits_alone(theirs, sequences_of(row))])
        places = row.masked_positions[row.masked_kind > 0]
        expected = add_tallies(expected, tally_by_hand(logits[places], row))
    found = evaluate(capsys, tmp_path / "run", corpus, "--rows", "3")
    assert found["loss"] == pytest.approx(expected.loss / expected.count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected.loss / expected.count), rel=1e-4)
    assert found["mask_perplexity"] == pytest.approx(math.exp(expected.mask_loss / expected.mask_count), rel=1e-4)
    assert found["masked_accuracy"] == expected.correct / expected.count
    assert found["masked_positions"] == expected.count


def test_run_folder_step_folder_and_prefix_give_the_runs_last_validation(
    finished: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, corpus = Path(finished.config.run.dir), Path(finished.config.data.path)
    newest = finished.checkpoints / "step_00000002"
    output = tmp_path / "numbers.json"
    first = evaluate(capsys, run_folder, corpus, "--output", str(output))
    assert first["model"] == str(newest)
    assert first["data"] == str(corpus / "valid")
    assert json.loads(output.read_text()) == first
    assert evaluate(capsys, newest, corpus / "valid", "--rows", "9999") == first
    rows = (run_folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert first["loss"] == last["validation_loss"]
    assert first["mask_perplexity"] == last["validation_mask_perplexity"]
    before = evaluate(capsys, finished.checkpoints / "step_00000001", corpus)
    assert before["loss"] != first["loss"]
    other_part = evaluate(capsys, newest, corpus / "train")
    assert other_part["masked_positions"] != first["masked_positions"]
    assert set(NUMBERS) | {"model", "data", "residue_frequency_perplexity"} == set(first)


def test_a_damaged_newest_save_is_passed_over_but_not_when_it_is_named(
    finished: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(finished.config.data.path)
    saves = Path(shutil.copytree(finished.checkpoints, tmp_path / "run" / "checkpoints"))
    newest = saves / "step_00000002"
    os.truncate(newest / "weights" / "__0_0.distcp", 1000)
    assert evaluate(capsys, tmp_path / "run", corpus)["model"] == str(saves / "step_00000001")
    assert f"the checkpoint {newest} is not whole: {newest}/weights/__0_0.distcp has 1000 bytes" in refused(
        capsys, newest, corpus
    )
    (newest / "state.json").unlink()
    assert f"the checkpoint {newest} is not whole" in refused(capsys, newest, corpus)
    (newest / "manifest.json").unlink()  # nothing tells it from a run folder any more
    assert f"{newest} holds no checkpoint" in refused(capsys, newest, corpus)


def test_what_is_no_run_is_refused(finished: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, run_folder = Path(finished.config.data.path), Path(finished.config.run.dir)
    assert "absent is not a folder; name a run folder or one of" in refused(capsys, tmp_path / "absent", corpus)
    assert f"{tmp_path} holds no checkpoint; name a run folder" in refused(capsys, tmp_path, corpus)
    assert "metrics.jsonl is not a folder" in refused(capsys, run_folder / "metrics.jsonl", corpus)
    assert "absent.json: is missing" in refused(capsys, run_folder, tmp_path / "absent")
    assert "valid.json: is missing" in refused(capsys, run_folder, tmp_path)


def test_another_vocabulary_is_refused(finished: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path, vocabulary=get_vocabulary("iupac"))
    error = refused(capsys, Path(finished.config.run.dir), corpus)
    assert f"the corpus {corpus}/valid has the vocabulary iupac, but " in error
    assert "has esm; preprocess with --vocabulary esm." in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rows", "-1"], "--rows is -1; give 0 (all) or more."),
        (["--output", "/absent/numbers.json"], "--output /absent/numbers.json: its folder does not exist"),
        (["--parallel.tensor", "2"], "needs a multiple of 2 processes, but there are 1"),
        (["--parallel.tensor", "3", "--check_processes", "3"], "parallel.tensor 3 does not divide the model (heads 2"),
        (["--parallel.pipeline", "3", "--check_processes", "3"], "the model has only 2 layers"),
        (["--task", "contacts"], "--task must be "),
        (["--modle", "x"], "did you mean --model?"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str], sentence: str, finished: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, Path(finished.config.run.dir), Path(finished.config.data.path), *flags)


def test_the_check_for_several_processes_measures_nothing(
    finished: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--model", finished.config.run.dir, "--data", finished.config.data.path]
    capsys.readouterr()
    assert cli.main(["evaluate", *places, "--check_processes", "4", "--parallel.tensor", "2"]) == 0
    assert capsys.readouterr().out == "model and data are valid for 4 processes\n"
