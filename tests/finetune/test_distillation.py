"""Students against their teachers: what they begin with, and the three losses written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megaprot.common.errors import InputError
from megaprot.finetune.config import HeadConfig
from megaprot.finetune.config_distillation import LossConfig
from megaprot.finetune.distillation import Distillation, chosen_layers, make_student
from megaprot.finetune.examples import Example
from megaprot.finetune.hugging_face import load_encoder
from tests.finetune.folders import bert_folder, esm_folder, random_proteins, residue_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return esm_folder(tmp_path_factory.mktemp("teacher") / "model", num_hidden_layers=4)


def pupil_and_examples(
    teacher: Path, folder: Path, num_layers: int, hidden_size: int = 0, max_residues: int = 0
) -> tuple[Distillation, torch.nn.Module, list[Example]]:
    make_student(teacher, folder, num_layers, hidden_size, 1)
    task = Distillation(teacher, LossConfig(), max_residues, CPU)
    encoder = load_encoder(folder, with_head=True)
    torch.manual_seed(1)
    model = task.build_model(encoder, task.build_head(HeadConfig(), encoder), False)
    ids = residue_ids(encoder, random_proteins([25, 11, 40]))
    return task, model, [Example(place, place, str(place), one, "", np.empty(0)) for place, one in enumerate(ids)]


def test_layers_are_evenly_spaced_and_the_last_is_the_last() -> None:
    assert chosen_layers(12, 6) == [2, 4, 6, 8, 10, 12]
    assert chosen_layers(33, 3) == [11, 22, 33]
    assert chosen_layers(6, 6) == [1, 2, 3, 4, 5, 6]


def test_a_student_begins_as_every_second_layer_of_its_teacher(teacher: Path, tmp_path: Path) -> None:
    make_student(teacher, tmp_path / "student", 2, 0, 1)
    whole = load_encoder(teacher, with_head=True).model.state_dict()
    student = load_encoder(tmp_path / "student", with_head=True)
    assert student.num_layers == 2
    for name, tensor in student.model.state_dict().items():
        source = name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
        if "contact_head" not in name:
            torch.testing.assert_close(tensor, whole[source])


def test_a_bert_is_shortened_too(tmp_path: Path) -> None:
    teacher = bert_folder(tmp_path / "teacher")
    make_student(teacher, tmp_path / "student", 1, 0, 1)
    name = "bert.encoder.layer.{}.output.dense.weight"
    whole, short = (load_encoder(tmp_path / one, with_head=True).model.state_dict() for one in ("teacher", "student"))
    torch.testing.assert_close(short[name.format(0)], whole[name.format(2)])


def test_a_student_with_all_layers_differs_in_nothing(teacher: Path, tmp_path: Path) -> None:
    task, model, examples = pupil_and_examples(teacher, tmp_path / "student", 4)
    found = model(task.collate(model.encoder, examples, 3))
    torch.testing.assert_close(found["truth"], found["teacher_truth"], atol=1e-5, rtol=1e-5)
    assert found["logits"].abs().max().item() < 1e-5
    assert found["hidden"].max().item() < 1e-8


@pytest.mark.parametrize("hidden_size", [0, 16])
def test_the_losses_are_what_they_are_called(teacher: Path, tmp_path: Path, hidden_size: int) -> None:
    task, model, examples = pupil_and_examples(teacher, tmp_path / "student", 2, hidden_size)
    assert model.encoder.hidden_size == (hidden_size or 32)
    inputs = task.collate(model.encoder, examples, 3)
    found = model(inputs)
    for number in range(3):
        start, end = inputs.batch.cu_seqlens[number], inputs.batch.cu_seqlens[number + 1]
        own = (inputs.places >= start) & (inputs.places < end)
        both = []
        for encoder, layers in ((model.encoder, [1, 2]), (task.teacher, [2, 4])):
            states = encoder(inputs.batch, layers=layers)
            both.append(([one[start:end] for one in states], encoder.logits(states[-1][inputs.places[own]])))
        (own_states, own_logits), (their_states, their_logits) = both
        wanted, got = (functional.softmax(one / 2, dim=1) for one in (their_logits, own_logits))
        divergence = 4 * (wanted * (wanted.log() - got.log())).sum()
        truth = functional.cross_entropy(own_logits, inputs.truth[own], reduction="sum")
        hidden = 0.0
        for place, (mine, theirs) in enumerate(zip(own_states, their_states, strict=True)):
            normed = [functional.layer_norm(one, (32,)) for one in (model.head[place](mine), theirs)]
            hidden = hidden + (normed[0] - normed[1]).square().mean(dim=1).sum() / 2
        torch.testing.assert_close(found["truth"][number], truth, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["logits"][number], divergence, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["hidden"][number], hidden, atol=1e-4, rtol=1e-4)
        assert int(found["num_masked"][number]) == int(own.sum())
    total = found["truth"].sum() + found["logits"].sum() + 0.15 * found["hidden"].sum()
    torch.testing.assert_close(task.loss(found, examples), total)


def test_only_the_student_learns(teacher: Path, tmp_path: Path) -> None:
    task, model, examples = pupil_and_examples(teacher, tmp_path / "student", 2, 16)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"encoder", "head"}
    task.loss(model(task.collate(model.encoder, examples, 3)), examples).backward()
    assert all(one.grad is None for one in task.teacher.parameters())
    assert all(one.grad is not None and one.grad.any() for one in model.head.parameters())


def test_masks_are_drawn_anew_in_training_and_never_when_scoring(teacher: Path, tmp_path: Path) -> None:
    task, model, examples = pupil_and_examples(teacher, tmp_path / "student", 2)
    places = [task.collate(model.encoder, examples, seed).places.tolist() for seed in (1, 1, 2, None, None)]
    assert places[0] == places[1] != places[2]
    assert places[3] == places[4]
    alone = task.collate(model.encoder, examples[1:2], None)
    together = task.collate(model.encoder, examples, None)
    start = together.batch.cu_seqlens[1]
    own = together.places[(together.places >= start) & (together.places < together.batch.cu_seqlens[2])]
    assert alone.places.tolist() == (own - start).tolist()  # whatever else is in the row


def test_long_proteins_are_cut_and_counted(teacher: Path, tmp_path: Path) -> None:
    task, model, examples = pupil_and_examples(teacher, tmp_path / "student", 2, max_residues=12)
    assert task.collate(model.encoder, examples, 3).batch.lengths == (14, 13, 14)
    assert [task.num_tokens(one, model.encoder) for one in examples] == [14, 13, 14]
    assert "2 proteins" in task.notes(examples, model.encoder)[0]


def test_perplexity_is_over_all_masked_residues(teacher: Path, tmp_path: Path) -> None:
    task, model, examples = pupil_and_examples(teacher, tmp_path / "student", 2)
    with torch.no_grad():
        found = model(task.collate(model.encoder, examples, None))
    metrics = task.metrics(examples, task.outcomes(found, examples))
    expected = torch.exp(found["truth"].sum() / found["num_masked"].sum())
    assert abs(metrics["perplexity"](np.ones(3)) - expected.item()) < 1e-3
    assert set(metrics) == set(task.definitions())


@pytest.mark.parametrize(("layers", "hidden_size", "message"), [(5, 0, "give 1 to as many"), (2, 17, "multiple")])
def test_a_student_that_cannot_be_is_one_sentence(
    teacher: Path, tmp_path: Path, layers: int, hidden_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_student(teacher, tmp_path / "student", layers, hidden_size, 1)
    assert not (tmp_path / "student").exists()
