"""The task function end to end: what learns, one step against plain autograd, and the folder that comes out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaprot.common.errors import InputError
from megaprot.common.stopping import StopRequest
from megaprot.finetune.config import FinetuneConfig
from megaprot.finetune.config_function import SplitConfig
from megaprot.finetune.function.splits import TRAIN
from megaprot.finetune.function.two_towers import ProteinPart, VectorBlock
from megaprot.finetune.gradient_caching import cached_step
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.micro_batches import MicroBatch
from megaprot.finetune.model_folder import read_model
from megaprot.finetune.processes import Place
from megaprot.finetune.protein_states import gather_proteins
from megaprot.finetune.splits import prepare
from megaprot.finetune.training import Run, train
from tests.finetune.function.towers_data import config_of, inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("function"))


def run_of(config: FinetuneConfig, place: Place) -> Run:
    task, training, valid = prepare(config, load_encoder(Path(config.model)))
    return Run(config, task, training, valid, place)


LORA: dict[str, Any] = {"mode": "lora", "lora_rank": 2}


@pytest.mark.parametrize(
    ("sections", "learning"),
    [
        ({}, ("head.",)),
        ({"head": {"name": "concat"}, "function": {"graph": "ancestors", "pooling": "attention"}}, ("head.",)),
        ({"tuning": LORA, "function": {"text_tuning": "lora", "loss": "contrastive"}}, ("head.", "lora_")),
        ({"tuning": {"mode": "full"}, "head": {"name": "bilinear"}, "function": {"text_tuning": "full"}},
         ("head.", "encoder.", "text.")),
        ({"tuning": LORA, "function": {"quantize": "4bit", "text_tuning": "lora"}}, ("head.", "lora_")),
    ],
    ids=["frozen", "concat", "lora", "full", "few_bits"],
)  # fmt: skip
def test_every_parameter_of_the_head_moves_and_no_frozen_one_does(
    folder: Path, place: Place, tmp_path: Path, sections: dict[str, Any], learning: tuple[str, ...]
) -> None:
    if "quantize" in sections.get("function", {}):
        pytest.importorskip("bitsandbytes")
    config = config_of(folder, str(tmp_path / "out"), **{key: dict(value) for key, value in sections.items()})
    run = run_of(config, place)
    before = {name: one.detach().clone() for name, one in run.engine.model.named_parameters()}
    for _ in range(2):  # LoRA's second matrix begins at 0, so the first has a gradient from the second step on
        run.take_step()
    still = {name for name, one in run.engine.model.named_parameters() if torch.equal(one.detach(), before[name])}
    unused = {name for name in before if any(part in name for part in ("pooler", "contact_head", "position_embedd"))}
    expected = {name for name in before if any(part in name for part in learning)} - unused
    learns = {name for name, one in run.engine.model.named_parameters() if one.requires_grad}
    assert not expected & still - rows_that_no_token_reaches(still)
    assert still >= set(before) - expected - unused
    assert {name for name in before if name.startswith("head.")} <= learns


def rows_that_no_token_reaches(names: set[str]) -> set[str]:
    """Parameters a loss may leave alone though they learn: attention's key bias, which softmax takes away."""
    return {name for name in names if name.endswith("key.bias") or "token_type" in name}


@pytest.mark.parametrize("loss", ["bce", "contrastive"])
def test_a_step_in_micro_batches_has_the_gradient_of_one_big_batch(
    folder: Path, place: Place, tmp_path: Path, loss: str
) -> None:
    config = config_of(folder, str(tmp_path / "out"), tuning={"mode": "full"},
                       function={"text_tuning": "full", "loss": loss, "pooling": "attention"})  # fmt: skip
    run = run_of(config, place)
    model, task = run.engine.model.double().eval(), run.task
    assert isinstance(model, torch.nn.Module)
    members = list(range(10))
    block = task.block(model, run.train, [MicroBatch((3, 1, 4)), MicroBatch((0, 2)), MicroBatch((5, 6, 7, 8, 9))], 5)
    assert block is not None
    assert len(block.parts) > 3  # texts are among them

    def backward(value: torch.Tensor, is_last: bool) -> None:
        value.backward()

    cached_step(model, block, lambda outputs: task.loss(outputs, block.members), backward, place.device)
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    order = [3, 1, 4, 0, 2, 5, 6, 7, 8, 9]
    assert sorted(order) == members
    rows = gather_proteins(run.encoder.vocabulary, 0, [run.train[one].residues for one in order])
    whole: Any = block.join([model(part) for part in block.parts])
    proteins = model(ProteinPart(rows, np.arange(10)))
    outputs = model(VectorBlock(proteins, whole.terms, whole.block, whole.labels, whole.is_known))
    task.loss(outputs, block.members).backward()
    wanted = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


def test_vectors_of_frozen_towers_are_made_once(folder: Path, place: Place, tmp_path: Path) -> None:
    run = run_of(config_of(folder, str(tmp_path / "out")), place)
    calls = {"encoder": 0, "text": 0}
    run.engine.model.encoder.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1))
    run.engine.model.text.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    for _ in range(2 * run.order.steps_per_epoch):
        run.take_step()
    run.validate()
    once = dict(calls)
    for _ in range(run.order.steps_per_epoch):
        run.take_step()
    run.validate()
    assert calls == once


def test_vectors_that_are_kept_serve_the_next_run(
    folder: Path, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        config = config_of(folder, str(tmp_path / f"out{number}"), function={"vectors": "vectors"})
        run = run_of(config, place)
        for tower in (run.engine.model.encoder, run.engine.model.text):
            tower.register_forward_hook(lambda *_: calls.append(number))  # noqa: B023
        run.take_step()
        run.task.finish(run.valid, run.validate().outcomes)
    assert 0 in calls
    assert 1 not in calls
    assert len(list((tmp_path / "vectors").iterdir())) == 2
    run.write("last", {})
    monkeypatch.chdir(folder)  # the model finds them from anywhere
    tuned = read_model(tmp_path / "out1" / "last")
    for tower in (tuned.model.encoder, tuned.model.text):
        tower.register_forward_hook(lambda *_: calls.append(2))  # type: ignore[operator, union-attr]
    valid = tuned.task.read(folder / "data", "valid", tuned.encoder.vocabulary)
    with torch.no_grad():
        tuned.model(tuned.task.collate(tuned.encoder, valid, None))
    assert 2 not in calls


def test_a_run_writes_a_model_that_scores_as_it_did(folder: Path, place: Place, tmp_path: Path) -> None:
    config = config_of(folder, str(tmp_path / "out"), tuning=LORA, train={"num_steps": 4},
                       function={"text_tuning": "lora", "pooling": "attention"})  # fmt: skip
    run = run_of(config, place)
    result = train(run, StopRequest())
    assert result.is_finished
    scored = run.validate().outcomes
    tuned = read_model(tmp_path / "out" / "last")
    assert {path.name for path in (tmp_path / "out" / "last").iterdir()} == {
        "task.json", "head.safetensors", "encoder", "text_encoder", "ontology.json.gz",
    }  # fmt: skip
    examples = tuned.task.read(Path(config.data), "valid", tuned.encoder.vocabulary)
    assert [one.identifier for one in examples] == [one.identifier for one in run.valid]
    with torch.no_grad():
        scores = tuned.model(tuned.task.collate(tuned.encoder, examples, None))
    for outcome, row in zip(tuned.task.outcomes(scores, examples), scored.scores, strict=True):
        np.testing.assert_allclose(outcome["scores"], row, atol=1e-5)


def test_scores_are_consistent_and_metrics_and_grid_are_whole(folder: Path, place: Place, tmp_path: Path) -> None:
    run = run_of(config_of(folder, str(tmp_path / "out")), place)
    scored = run.validate().outcomes
    task: Any = run.task
    ontology, terms = task.ontology, task.source.scored[1]
    place_of = {term: column for column, term in enumerate(terms.tolist())}
    for row in scored.scores:
        for term, column in place_of.items():
            for parent in ontology.parents[ontology.parent_starts[term] : ontology.parent_starts[term + 1]].tolist():
                if parent in place_of:  # not an unseen one of the test
                    assert row[place_of[parent]] >= row[column]
    task.finish(run.valid, scored)
    metrics = task.metrics(run.valid, scored)
    assert set(metrics) == set(task.definitions())
    ones = np.ones(len(run.valid))
    each = [metrics[f"fmax_{aspect}"](ones) for aspect in ("bpo", "cco", "mfo")]
    assert abs(metrics["fmax"](ones) - sum(each) / 3) < 1e-9
    (grid,) = task.sections(run.valid, scored)
    assert set(grid.numbers) == {"unseen_protein_seen_term", "unseen_protein_unseen_term"}
    json.dumps(grid.numbers, allow_nan=False)


def test_a_namespace_that_no_protein_has_does_not_count_in_means(folder: Path, place: Place, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    table = tmp_path / "data" / "train_terms.tsv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.endswith("CCO\n")))
    config = config_of(folder, str(tmp_path / "out"))
    config.data = str(tmp_path / "data")
    run = run_of(config, place)
    metrics = run.task.metrics(run.valid, run.validate().outcomes)
    values = {name: metric(np.ones(len(run.valid))) for name, metric in metrics.items()}
    for name in ("fmax", "smin"):
        assert np.isnan(values[f"{name}_cco"])
        assert values[name] == pytest.approx((values[f"{name}_bpo"] + values[f"{name}_mfo"]) / 2)


def test_training_proteins_show_no_unseen_term(folder: Path, place: Place, tmp_path: Path) -> None:
    run = run_of(config_of(folder, str(tmp_path / "out")), place)
    task: Any = run.task
    unseen = set(np.flatnonzero(task.source.split.terms > TRAIN).tolist())
    assert unseen
    assert not unseen & {term for one in run.train for term in one.terms.tolist()}
    block: Any = task.block(run.engine.model, run.train, [MicroBatch((0, 1, 2))], 3)
    joined = block.join([torch.zeros(3, 64)])
    assert not unseen & set(joined.block.asked.tolist())


def test_sharded_states_take_the_same_steps(folder: Path, place: Place, tmp_path: Path) -> None:
    found = []
    for stage in (0, 2):
        config = config_of(folder, str(tmp_path / f"out{stage}"), tuning={"mode": "full"},
                           function={"text_tuning": "full"})  # fmt: skip
        config.engine.zero_stage = stage  # type: ignore[assignment]
        run = run_of(config, place)
        found.append([run.take_step()[0] for _ in range(3)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_model": ""}, "--text_model is missing"),
        ({"text_model": "nowhere"}, "nowhere is no Hugging Face model folder"),
        ({"function": {"template": "{title}"}}, "cannot be filled"),
        ({"function": {"template": "a term"}}, "neither {name} nor {definition}"),
        ({"function": {"quantize": "4bit"}, "tuning": {"mode": "full"}}, "--tuning.mode frozen or lora"),
        ({"function": {"vectors": __file__}}, "is a file: name a folder"),
        ({"function": {"num_terms": 0}}, "function.num_terms is 0"),
        ({"function": {"split": SplitConfig(valid_proteins=0.0)}}, "a larger --function.split.valid_proteins"),
        ({"zero_stage": 3}, "give 0, 1 or 2"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    folder: Path, place: Place, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    sections = {key: value for key, value in change.items() if isinstance(value, dict)}
    config = config_of(folder, str(tmp_path / "out"), **sections)
    config.text_model = change.get("text_model", config.text_model)
    config.engine.zero_stage = change.get("zero_stage", 0)
    with pytest.raises(InputError, match=message):
        run_of(config, place)


def test_a_split_that_does_not_exist_is_named(folder: Path, place: Place, tmp_path: Path) -> None:
    run = run_of(config_of(folder, str(tmp_path / "out")), place)
    with pytest.raises(InputError, match="train, valid, test"):
        run.task.place_of(folder / "data", "holdout")
    notes = "\n".join(run.task.notes(run.train, run.encoder))
    assert "proteins: 60" in notes
    assert "seen" in notes
