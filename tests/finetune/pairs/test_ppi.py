"""The cross-encoder against PLM-interact's formula written with transformers; what its scores must not depend on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megaprot.common.errors import InputError
from megaprot.common.metrics_log import read_metrics
from megaprot.finetune.batch import pack_pairs
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig, TuningConfig
from megaprot.finetune.config_ppi import PpiConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.pairs.files import PairExample, read_pairs
from megaprot.finetune.pairs.heads import pair_head
from megaprot.finetune.pairs.inputs import PairInputs, Reading
from megaprot.finetune.pairs.model import PpiModel, joined
from megaprot.finetune.tasks.ppi import Ppi, swapped
from megaprot.pretrain import parallel
from megaprot.tools import cli
from tests.distributed.run import run_processes
from tests.finetune.folders import bert_folder, esm_folder, random_proteins, residue_ids
from tests.finetune.pairs.pair_data import pair_folder

LENGTHS = ((12, 30), (25, 4), (17, 17), (3, 40))


def task_with(head: str = "auto", mode: Any = "full", **settings: Any) -> Ppi:
    task = Ppi(LabelConfig())
    config = FinetuneConfig("ppi", "model", "data", "output", ppi=PpiConfig(**settings))
    config.head, config.tuning = HeadConfig(name=head), TuningConfig(mode=mode)
    task.configure(config)
    task.pos_weight = settings.get("pos_weight", 1.0)
    return task


def examples_of(encoder: Encoder, lengths: Any = LENGTHS) -> list[PairExample]:
    found = []
    for number, both in enumerate(lengths):
        residues = residue_ids(encoder, random_proteins(both, number))
        found.append(PairExample(number, number, f"a{number}", f"b{number}", residues[0], residues[1], number % 2))
    return found


def model_of(task: Ppi, encoder: Encoder, name: str = "interaction") -> PpiModel:
    torch.manual_seed(2)
    head = pair_head(name, encoder.hidden_size, 16, 0.0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return task.build_model(encoder, head, False)


def plm_interact_losses(
    model: Any, classifier: torch.nn.Linear, inputs: PairInputs, labels: list[int], pos_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class loss and masked-language loss: two passes over one padded batch, as PLM-interact takes them."""
    from torch.nn.utils.rnn import pad_sequence

    row, ignored = inputs.row, -100
    truth = torch.full_like(row.tokens, ignored)
    truth[inputs.masked] = inputs.truth
    tokens = pad_sequence(list(row.tokens.split(row.lengths)), True, model.config.pad_token_id)
    truths = pad_sequence(list(truth.split(row.lengths)), True, ignored)
    attention_mask = (tokens != model.config.pad_token_id).long()
    logits = model(input_ids=tokens, attention_mask=attention_mask).logits
    mlm_loss = torch.stack([functional.cross_entropy(one, other) for one, other in zip(logits, truths, strict=True)])
    states = model.base_model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state
    scores = classifier(torch.relu(states[:, 0])).squeeze(1)
    weight = torch.tensor(pos_weight)
    class_loss = functional.binary_cross_entropy_with_logits(scores, torch.tensor(labels).float(), pos_weight=weight)
    return scores, class_loss, mlm_loss.mean()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_one_pass_equals_plm_interacts_two(implementation: str, tmp_path: Path) -> None:
    """Logits, loss and every gradient, token dropout of the packed row among them."""
    from transformers import EsmForMaskedLM

    folder = esm_folder(tmp_path / "model")
    encoder = load_encoder(folder, with_head=True)
    task = task_with(class_weight=10.0, mlm_weight=1.0, pos_weight=4.0, mask_rate=0.22)
    model = model_of(task, encoder, "plm-interact").train()
    examples = examples_of(encoder)
    inputs = task.collate(encoder, examples, seed=5)
    assert (inputs.row.tokens == encoder.vocabulary.mask).any()
    outputs = model(inputs)
    loss = task.loss(outputs, examples) / len(examples)
    loss.backward()
    theirs = EsmForMaskedLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32).train()
    classifier = torch.nn.Linear(32, 1)
    classifier.load_state_dict({name: one.detach().clone() for name, one in model.head.classifier.state_dict().items()})  # type: ignore[union-attr,operator]
    scores, class_loss, mlm_loss = plm_interact_losses(theirs, classifier, inputs, [0, 1, 0, 1], 4.0)
    expected_loss = 10.0 * class_loss + mlm_loss
    expected_loss.backward()
    assert torch.allclose(outputs[0].squeeze(1), scores, atol=1e-5)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    expected = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    found = {name: one.grad for name, one in encoder.model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * float(gradient.abs().max() + 1)), name
    assert torch.allclose(model.head.classifier.weight.grad, classifier.weight.grad, atol=1e-4)  # type: ignore[union-attr,arg-type]


def test_training_reads_masked_tokens_and_scoring_clean_ones_in_both_orders(tmp_path: Path) -> None:
    encoder = load_encoder(esm_folder(tmp_path / "model"))
    task, examples = task_with(), examples_of(encoder)
    masked = task.collate(encoder, examples, 3)
    assert masked.row.num_sequences == 4
    assert len(masked.masked) > 0
    clean = task.collate(encoder, examples, None)
    both = [pair for one in examples for pair in ((one.residues_first, one.residues_second),
                                                  (one.residues_second, one.residues_first))]  # fmt: skip
    assert torch.equal(clean.row.tokens, pack_pairs(encoder.vocabulary, both).tokens)
    assert len(clean.masked) == 0
    task.settings.symmetric = False
    assert task.collate(encoder, examples, None).row.num_sequences == 4
    doubled = task.training_examples(examples)
    assert [(one.first, one.second) for one in doubled[4:]] == [(one.second, one.first) for one in examples]
    assert sorted(one.number for one in doubled) == list(range(-4, 4))


@pytest.mark.parametrize("head", ["interaction", "plm-interact"])
@pytest.mark.parametrize("make", [esm_folder, bert_folder])
def test_scores_depend_neither_on_order_nor_on_the_batch(make: Any, head: str, tmp_path: Path) -> None:
    encoder = load_encoder(make(tmp_path / "model", max_position_embeddings=128))
    task, examples = task_with(), examples_of(encoder)
    model = model_of(task, encoder, head).eval()

    def scores(members: list[PairExample]) -> np.ndarray:
        with torch.no_grad():
            outputs = model(task.collate(encoder, members, None))
        return np.array([one["logits"] for one in task.outcomes(outputs, members)])

    together = scores(examples)
    turned = scores([swapped(one) for one in examples])
    assert np.abs(together.mean(1) - turned.mean(1)).max() < 1e-6 * max(1, np.abs(together).max())
    assert np.abs(together[:, 0] - together[:, 1]).max() > 1e-4  # the two orders do differ
    alone = np.concatenate([scores([one]) for one in examples])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(scores(examples[::-1])[::-1] - together).max() < 1e-5


def test_windows_of_long_pairs_are_joined_by_their_mean_odds(tmp_path: Path) -> None:
    encoder = load_encoder(esm_folder(tmp_path / "model"))
    task = task_with(max_length=23, long_pairs="windows", symmetric=False)
    examples = examples_of(encoder, ((30, 25), (9, 8)))
    model = model_of(task, encoder).eval()
    inputs = task.collate(encoder, examples, None)
    assert max(inputs.row.lengths) == 23
    with torch.no_grad():
        logits, _, left_out = model(inputs)
        each = model.head(inputs.row, encoder(inputs.row)[0])
    num_windows = inputs.row.num_sequences - 1
    assert num_windows > 4
    assert float(logits[0, 0]) == pytest.approx(float(each[:num_windows].exp().mean().log()), abs=1e-5)
    assert float(logits[1, 0]) == pytest.approx(float(each[num_windows]), abs=1e-6)
    assert left_out.tolist() == [0, 0]
    drawn = {tuple(task.collate(encoder, examples, seed).row.lengths) for seed in range(4)}
    assert drawn == {(23, 20)}  # training reads one pair of windows of each, another one each step
    tokens = {tuple(task.collate(encoder, examples[:1], seed).row.tokens.tolist()) for seed in range(8)}
    assert len(tokens) > 2
    assert task.num_tokens(examples[0], encoder) == sum(inputs.row.lengths[:-1])


def test_joined_logits_of_equal_windows_are_theirs() -> None:
    readings = [Reading(np.array([5], np.uint8), np.array([6], np.uint8), score) for score in (0, 0, 1)]
    from megaprot.common.vocabulary import get_vocabulary
    from megaprot.finetune.pairs.inputs import gather_pairs

    inputs = gather_pairs(get_vocabulary("esm"), readings, [0, 0])
    assert joined(torch.tensor([300.0, 300.0, -2.0]), inputs).tolist() == [[300.0], [-2.0]]


def test_truncated_pairs_are_counted_in_notes_and_report(tmp_path: Path) -> None:
    encoder = load_encoder(esm_folder(tmp_path / "model"))
    task, examples = task_with(max_length=23), examples_of(encoder, (*LENGTHS, (8, 9)))
    notes = task.notes(task.training_examples(examples), encoder)
    assert "4 of 5 pairs are longer than 23 tokens: truncated" in notes[-1]
    inputs = task.collate(encoder, examples, None)
    assert inputs.left_out.tolist() == [22, 9, 14, 23, 0]
    assert [task.num_tokens(one, encoder) for one in examples] == [23, 23, 23, 23, 20]
    outcomes = [{"logits": np.array([1.0, -1.0]), "left_out": np.array([count])} for count in (3, 0, 0, 2, 0)]
    section = task.reading_section(outcomes)
    assert section.numbers == {"num_truncated": 2, "residues_left_out": 5, "num_order_flips": 5}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_rate": 1.0}, "--ppi.mask_rate is 1.0; give a share"),
        ({"mask_rate": 0.0}, "--ppi.mask_rate 0 leaves nothing for the masked-language loss"),
        ({"mlm_weight": -1.0}, "--ppi.mlm_weight is -1.0; give 0 or more"),
        ({"class_weight": 0.0}, "--ppi.class_weight is 0.0; give a number above 0"),
        ({"max_length": 5}, "--ppi.max_length is 5; give 16 tokens or more"),
        ({"mode": "frozen"}, "--tuning.mode frozen learns no masked-language model"),
    ],
)
def test_impossible_settings_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        task_with(**settings)


@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_a_run_learns_evaluates_and_keeps_threshold_and_settings(mode: str, tmp_path: Path) -> None:
    if dist.is_initialized():
        parallel.stop_processes()
    model = esm_folder(tmp_path / "model", initializer_range=0.02)
    data = pair_folder(tmp_path / "data", {"train": 400, "valid": 64, "test": 64})
    mlm_weight = "0" if mode == "frozen" else "0.5"
    run = tmp_path / "run"
    command = ["finetune", "--task", "ppi", "--model", str(model), "--data", str(data), "--output", str(run)]
    options = {"train.num_steps": "40" if mode == "full" else "6", "train.batch_size": "32", "optim.lr": "0.001",
               "ppi.mlm_weight": mlm_weight, "ppi.max_length": "48", "tuning.mode": mode, "train.max_tokens": "4096",
               "train.eval_interval": "20"}  # fmt: skip
    assert cli.main([*command, *(part for key, value in options.items() for part in (f"--{key}", value))]) == 0
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert np.isfinite(losses).all()
    assert cli.main(["evaluate", "--task", "ppi", "--model", str(run), "--data", str(data), "--split",
                     "test"]) == 0  # fmt: skip
    results = json.loads((run / "evaluation_test" / "results.json").read_text())
    assert mode != "full" or results["metrics"]["aupr"]["value"] > 0.7
    assert {"aupr", "auroc", "mcc", "ece", "order_flips"} <= set(results["metrics"])
    assert results["reading"]["num_truncated"] > 0
    learned = json.loads((run / "best" / "task.json").read_text())["learned"]
    assert learned["settings"]["max_length"] == 48
    assert learned["threshold"] != 0.0
    kept = load_encoder(run / "best" / "encoder", with_head=mode != "frozen")  # goes on to be scored with
    assert kept.hidden_size == 32
    assert len(read_pairs(data, "test", kept.vocabulary)) == 64


def test_an_encoder_without_mask_token_is_refused_where_residues_are_masked(tmp_path: Path) -> None:
    encoder = load_encoder(esm_folder(tmp_path / "model"))
    encoder.vocabulary = replace(encoder.vocabulary, mask=-1)
    with pytest.raises(InputError, match=r"has no mask token; give --ppi\.mask_rate 0"):
        model_of(task_with(), encoder)


@pytest.mark.slow
def test_masks_losses_and_scores_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    model = esm_folder(tmp_path / "model")
    data = pair_folder(tmp_path / "data", {"train": 24, "valid": 9})

    def found(num_processes: int, stages: str) -> dict[int, dict[str, Any]]:
        arguments = [str(model), str(data), str(tmp_path / "runs"), stages]
        lines = run_processes("tests.finetune.pairs.pair_worker", num_processes, arguments, 300.0)
        return {one["stage"]: one for one in lines}

    alone = found(1, "0")[0]
    assert len(alone["losses"]) == 4
    for stage, one in found(2, "0,3").items():
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-4), stage
        assert np.allclose(one["scores"], alone["scores"], atol=1e-4), stage
