"""Losses, accuracies and perplexities against a count by hand, position by position."""

import math
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megaprot.common.packing import PackedRow, to_tensors
from megaprot.pretrain.checkpoint import newest_complete
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.evaluation import add_tallies, evaluate_checkpoint, residue_frequency_perplexity
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.step import Tally
from megaprot.pretrain.stream import StreamPosition, ValidationStream
from megaprot.pretrain.training import Training
from tests.pretrain.runs import begin, run, small_config, tally_by_hand, write_corpus
from tests.pretrain.tiny import ESM

# Initial weights large enough for predictions to differ; dropout, which must not enter what is measured.
MODEL = {"initial_std": 0.3, "hidden_dropout": 0.3, "attention_dropout": 0.3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@torch.no_grad()
def logits_of(training: Training, row: PackedRow) -> NDArray[np.float32]:
    """Logits [used masked positions, true vocabulary] of the model as it stands."""
    batch = to_tensors(row, training.place.device)
    logits = training.chunks[0].module(batch)
    used = int((row.masked_kind > 0).sum())
    return np.asarray(logits[:used, : training.blend.vocabulary.size].cpu().numpy())


def sums_by_hand(training: Training, rows: list[PackedRow]) -> Tally:
    total = Tally()
    for row in rows:
        total = add_tallies(total, tally_by_hand(logits_of(training, row), row))
    return total


@pytest.mark.parametrize("eval_rows", [0, 3, 5])  # batches hold four rows: the last one has blank ones
def test_validation_is_the_count_by_hand(eval_rows: int, corpus: Path, tmp_path: Path, alone: Place) -> None:
    config = small_config(corpus, tmp_path, model=MODEL, train={"eval_rows": eval_rows})
    training = begin(config, alone)
    training.chunks[0].eval()
    rows = [training.validation.row(number) for number in range(eval_rows or training.validation.num_rows)]
    expected = sums_by_hand(training, rows)
    training.chunks[0].train()
    found = training.validate()
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-5)
    assert (found.count, found.mask_count, found.correct) == (expected.count, expected.mask_count, expected.correct)
    assert training.chunks[0].training
    assert 0 < expected.correct < expected.count
    assert 0 < expected.mask_count < expected.count


def test_a_row_of_the_log_is_the_count_by_hand(corpus: Path, tmp_path: Path, alone: Place) -> None:
    config = small_config(corpus, tmp_path, model={"initial_std": 0.3}, train={"num_steps": 1})
    training = begin(config, alone)
    places = training.stream.rows_of_step(StreamPosition(), 8, 0, 1)
    rows = [training.stream.row(epoch, row) for _, epoch, row in places]
    expected = sums_by_hand(training, rows)
    row = run(training)[0]
    assert row["loss"] == pytest.approx(expected.loss / expected.count, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(expected.loss / expected.count), rel=1e-5)
    assert row["masked_accuracy"] == expected.correct / expected.count
    assert row["mask_perplexity"] == pytest.approx(math.exp(expected.mask_loss / expected.mask_count), rel=1e-5)
    is_residue = [np.isin(row.tokens, [ESM.pad, ESM.begin, ESM.end], invert=True).sum() for row in rows]
    assert row["consumed_residues"] == sum(is_residue)
    assert row["learning_rate"] == config.optim.lr / config.optim.warmup_steps


def test_rows_of_an_interval_weigh_positions_alike(corpus: Path, tmp_path: Path, alone: Place) -> None:
    # The second batch is three times the first: averaging step by step would count its positions a third.
    sections = {"model": {"initial_std": 0.3}, "optim": {"lr": 1e-30, "min_lr": 0.0, "warmup_steps": 0}}
    train = {"num_steps": 2, "ramp_up_start_rows": 2, "ramp_up_increment_rows": 4, "ramp_up_steps": 1}
    train |= {"global_batch_rows": 6, "log_interval": 2, "save_interval": 0, "eval_interval": 0}
    training = begin(small_config(corpus, tmp_path, **sections, train=train), alone)
    places = [(0, number) for number in range(8)]
    expected = sums_by_hand(training, [training.stream.row(*place) for place in places])
    row = run(training)[0]
    assert row["loss"] == pytest.approx(expected.loss / expected.count, rel=1e-5)
    assert row["masked_accuracy"] == expected.correct / expected.count


def test_a_checkpoint_measures_as_its_run_did(corpus: Path, tmp_path: Path, alone: Place) -> None:
    training = begin(small_config(corpus, tmp_path, model=MODEL, train={"num_steps": 3, "eval_rows": 6}), alone)
    last = run(training)[-1]
    newest = newest_complete(training.checkpoints)
    assert newest is not None
    config = replace(training.config, run=replace(training.config.run, seed=1))  # start values that must not matter
    numbers = evaluate_checkpoint(newest, config, Corpus.open(corpus / "valid"), 6, alone)
    assert numbers["loss"] == last["validation_loss"]
    assert numbers["perplexity"] == last["validation_perplexity"]
    assert numbers["mask_perplexity"] == last["validation_mask_perplexity"]
    assert numbers["masked_accuracy"] == last["validation_masked_accuracy"]
    stream: ValidationStream = training.validation
    assert numbers["masked_positions"] == sum(int((stream.row(n).masked_kind > 0).sum()) for n in range(6))


def test_tallies_add_up_and_empty_ones_are_not_a_number() -> None:
    total = add_tallies(Tally(1.0, 2, 1, 0.5, 1), Tally(3.0, 6, 2, 1.5, 3))
    assert total == Tally(4.0, 8, 3, 2.0, 4)
    assert (total.mean_loss, total.accuracy) == (0.5, 0.375)
    assert (total.perplexity, total.mask_perplexity) == (math.exp(0.5), math.exp(0.5))
    assert all(map(math.isnan, (Tally().mean_loss, Tally().accuracy, Tally().mask_perplexity)))
    assert Tally(1e9, 1, 0, 1e9, 1).perplexity == math.inf


def test_residue_frequencies_give_the_exponential_of_their_entropy(corpus: Path) -> None:
    opened = Corpus.open(corpus / "train")
    counts = Counter(opened.residues.tolist())
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert residue_frequency_perplexity(opened) == pytest.approx(math.exp(entropy))
    assert 19 < residue_frequency_perplexity(opened) < 20
