"""A run that starts from an imported model starts where transformers says the model is."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary, get_vocabulary
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.training import Training
from megaprot.pretrain.validation import validate
from tests.pretrain.model.oracles import esm_for_masked_lm
from tests.pretrain.runs import run, saved_tensors, small_config, write_corpus
from tests.pretrain.tiny import ESM, world_of_one
from tests.tools.conversion.models import SMALL, converted

KEYS = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
MODEL = {key: getattr(SMALL, key) for key in KEYS} | {"token_dropout": True}


@pytest.fixture
def imported(tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint made of an ESM-2 of transformers, and the ESM-2."""
    theirs = esm_for_masked_lm(replace(SMALL, token_dropout=True), 80)
    theirs.save_pretrained(tmp_path / "hf")
    return converted(tmp_path / "hf", tmp_path / "imported", "megatron", "--vocabulary", "esm"), theirs


def started_from(step: Path, folder: Path, vocabulary: Vocabulary = ESM, **sections: dict[str, Any]) -> PretrainConfig:
    """A small run on a corpus below ``folder`` that begins with the weights of ``step``."""
    corpus = write_corpus(folder / "corpus", vocabulary=vocabulary)
    config = small_config(corpus, folder / "run", **{"model": MODEL} | sections)
    return replace(config, run=replace(config.run, initial_checkpoint=str(step)))


def loss_by_transformers(theirs: Any, rows: list[Any]) -> float:
    """Mean cross-entropy over the masked residues of packed rows, each sequence given to transformers alone."""
    losses = []
    for row in rows:
        bounds = row.cu_seqlens[: row.num_sequences + 1]
        used = int((row.masked_kind > 0).sum())
        labels = dict(zip(row.masked_positions[:used].tolist(), row.labels[:used].tolist(), strict=True))
        for first, last in pairwise(bounds):
            with torch.no_grad():
                tokens = torch.tensor(row.tokens[first:last].astype(int))[None]
                scores = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].log_softmax(-1)
            losses += [-float(scores[place - first, labels[place]]) for place in range(first, last) if place in labels]
    assert losses
    return sum(losses) / len(losses)


def test_the_first_loss_is_transformers_on_the_same_masked_batch(imported: tuple[Path, Any], tmp_path: Path) -> None:
    step, theirs = imported
    config = started_from(step, tmp_path)
    with world_of_one() as place:
        training = Training(config, validate(config, 1), place)
        number, rows, _ = next(iter(training.steps()))
        result, _ = training.take_step(number, rows, [0.0] * 5)
    assert result.tally.mean_loss == pytest.approx(loss_by_transformers(theirs, rows), abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_on_from_the_weights_and_resumes_from_its_own(
    precision: str, imported: tuple[Path, Any], tmp_path: Path
) -> None:
    step, _ = imported
    train = {"num_steps": 2, "precision": precision}
    config = started_from(step, tmp_path, train=train, optim={"lr": 1e-6, "min_lr": 0.0})
    with world_of_one() as place:
        run(Training(config, validate(config, 1), place))
        before = saved_tensors(step)
        after = saved_tensors(tmp_path / "run" / "checkpoints" / "step_00000002")
        for name, tensor in before.items():
            assert float((after[name].float() - tensor).abs().max()) < 2e-2, name
        gone = replace(config, run=replace(config.run, initial_checkpoint=str(tmp_path / "gone")))
        resumed = Training(gone, validate(gone, 1), place)
    assert resumed.state.step == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 3}, "model.num_layers is 3"),
        ({"token_dropout": False}, "model.token_dropout is False"),
        ({"ffn_hidden_size": 256}, "model.ffn_hidden_size is 256"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    model: dict[str, Any], words: str, imported: tuple[Path, Any], tmp_path: Path
) -> None:
    config = started_from(imported[0], tmp_path, model=MODEL | model)
    with pytest.raises(InputError, match=words):
        validate(config, 1)


def test_weights_that_are_not_whole_are_refused(imported: tuple[Path, Any], tmp_path: Path) -> None:
    step, _ = imported
    config = started_from(step, tmp_path)
    shard = step / "weights" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="is not whole"):
        validate(config, 1)
    missing = replace(config, run=replace(config.run, initial_checkpoint=str(tmp_path / "gone")))
    with pytest.raises(InputError, match="is not a folder"):
        validate(missing, 1)


def test_another_vocabulary_is_refused(imported: tuple[Path, Any], tmp_path: Path) -> None:
    config = started_from(imported[0], tmp_path, get_vocabulary("iupac"))
    with pytest.raises(InputError, match=f"has {ESM.name}"):
        validate(config, 1)
