"""The loop against plain torch, exact resumption, early stopping, and which weights learn."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megaprot.common.errors import InputError, RunError
from megaprot.common.metrics_log import read_metrics
from megaprot.common.stopping import StopRequest
from megaprot.finetune import saves
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LogConfig, OptimConfig, TrainConfig, TuningConfig
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.model_folder import read_model
from megaprot.finetune.processes import Place
from megaprot.finetune.protein_states import gather_proteins
from megaprot.finetune.splits import prepare
from megaprot.finetune.training import Run, RunResult, check_resumption, train
from megaprot.finetune.tuning import depth_of, learning_rate, parameter_groups, prepare_encoder
from tests.finetune.folders import esm_folder
from tests.finetune.tasks_data import secondary_structure


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder and data."""
    folder = tmp_path_factory.mktemp("inputs")
    model = esm_folder(folder / "model", token_dropout=False, initializer_range=0.02)
    return model, secondary_structure(folder / "data", {"train": 24, "valid": 9})


def config_of(inputs: tuple[Path, Path], output: Path, **sections: Any) -> FinetuneConfig:
    train = {"num_steps": 4, "batch_size": 5, "max_tokens": 60, "log_interval": 1, "eval_interval": 2}
    return FinetuneConfig(
        task="secondary_structure",
        model=str(inputs[0]),
        data=str(inputs[1]),
        output=str(output),
        head=HeadConfig(name="mlp", hidden_size=16, dropout=sections.pop("dropout", 0.0)),
        optim=OptimConfig(**{"lr": 1e-3, "warmup_share": 0.3} | sections.pop("optim", {})),
        train=TrainConfig(**train | sections.pop("train", {})),
        tuning=TuningConfig(**sections.pop("tuning", {})),
        **sections,
    )


def begun(config: FinetuneConfig, place: Place) -> Run:
    task, train_split, valid_split = prepare(config, load_encoder(Path(config.model)))
    return Run(config, task, train_split, valid_split, place)


def finished(config: FinetuneConfig, place: Place) -> RunResult:
    return train(begun(config, place), StopRequest())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "encoder" / "model.safetensors") | load_file(folder / "head.safetensors")


def series(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def test_steps_are_those_of_a_plain_torch_loop(inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    """Micro-batches of uneven sizes must add up to the mean over the step's labels, and gradients must be cleared."""
    run = begun(config_of(inputs, tmp_path), place)
    config = run.config
    encoder = load_encoder(inputs[0])
    torch.manual_seed(config.seed)
    head = run.task.build_head(config.head, encoder)
    model = run.task.build_model(encoder, head, False).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
    for step in range(4):
        members = [run.train[place] for place in run.order.members(step)]
        labels = torch.from_numpy(np.concatenate([run.task.labels_of(one) for one in members]))  # type: ignore[attr-defined]
        proteins = gather_proteins(encoder.vocabulary, 0, [one.residues for one in members])
        for group in optimizer.param_groups:
            group["lr"] = (1e-3, 0.75e-3, 0.5e-3, 0.25e-3)[step]  # one step of warm-up, then down
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(proteins), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found, num_residues, _ = run.take_step()
        assert found == pytest.approx(loss.item(), abs=2e-6)
        assert num_residues == len(labels)
        assert norm > 0
    theirs = model.state_dict()
    for name, weight in run.engine.model.state_dict().items():
        assert torch.allclose(weight, theirs[name], atol=1e-5), name


def test_a_stopped_run_goes_on_bit_for_bit(inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    config = config_of(inputs, tmp_path / "whole", dropout=0.3, train={"num_steps": 6})
    whole = finished(config, place)
    first = replace(config, output=str(tmp_path / "parts"))
    run = begun(first, place)
    stop = StopRequest()
    take_step, steps = run.take_step, []

    def stopping() -> tuple[float, int, float]:
        steps.append(1)
        stop.is_made = len(steps) == 3
        return take_step()

    run.take_step = stopping  # type: ignore[method-assign]
    part = train(run, stop)
    assert (part.num_steps, part.is_finished, part.was_stopped) == (3, False, True)
    assert not (tmp_path / "parts" / "last").exists()
    check_resumption(first, run.task, run.train)
    again = finished(first, place)
    assert again == whole
    for name, weight in weights(tmp_path / "whole" / "last").items():
        assert torch.equal(weight, weights(tmp_path / "parts" / "last")[name]), name
    for key in ("loss", "valid_loss", "valid_accuracy"):
        assert series(tmp_path / "whole", key) == series(tmp_path / "parts", key)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step_00000006"]


def test_a_damaged_save_is_passed_over_and_another_run_refused(
    inputs: tuple[Path, Path], tmp_path: Path, place: Place
) -> None:
    config = config_of(inputs, tmp_path, train={"num_steps": 2})
    finished(config, place)
    task, train_split, _ = prepare(config, load_encoder(inputs[0]))
    (found,) = (tmp_path / "checkpoints").iterdir()
    assert saves.newest(tmp_path / "checkpoints") == found
    with pytest.raises(InputError, match="holds a run with another seed"):
        check_resumption(replace(config, seed=7), task, train_split)
    with pytest.raises(InputError, match="holds a run with another head"):
        check_resumption(replace(config, head=HeadConfig(name="tape")), task, train_split)
    with pytest.raises(InputError, match="holds a run with another train_sha256"):
        check_resumption(config, task, train_split[1:])
    state = next((found / "state").iterdir())
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(bytes(content))
    assert saves.newest(tmp_path / "checkpoints") is None
    check_resumption(replace(config, seed=7), task, train_split)


def test_the_best_model_is_kept_and_patience_ends_the_run(
    inputs: tuple[Path, Path], tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(config_of(inputs, tmp_path, train={"num_steps": 40, "eval_interval": 1, "patience": 2}), place)
    values = iter([0.3, math.nan, 0.5, 0.4, 0.5, 0.9])
    metrics = run.task.metrics
    monkeypatch.setattr(run.task, "metrics", lambda *split: metrics(*split) | {"accuracy": lambda _: next(values)})
    result = train(run, StopRequest())
    assert (result.best_step, result.best_value, result.num_steps) == (3, 0.5, 5)
    assert result.is_finished
    assert json.loads((tmp_path / "best" / "task.json").read_text())["step"] == 3
    assert json.loads((tmp_path / "last" / "task.json").read_text())["step"] == 5
    assert series(tmp_path, "valid_accuracy") == [0.3, None, 0.5, 0.4, 0.5]


def test_what_is_written_predicts_as_the_run_did(inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    run = begun(config_of(inputs, tmp_path), place)
    train(run, StopRequest())
    tuned = read_model(tmp_path / "last")
    proteins = gather_proteins(tuned.encoder.vocabulary, 0, [one.residues for one in run.valid])
    run.engine.deepspeed.eval()
    with torch.no_grad():
        assert torch.allclose(tuned.model(proteins), run.engine.deepspeed(proteins), atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    with pytest.raises(RunError, match=r"the loss is nan at step \d; lower --optim.lr"):
        finished(config_of(inputs, tmp_path, optim={"lr": 1e30, "warmup_share": 0.0}), place)


@pytest.mark.parametrize("mode", ["full", "frozen", "top_layers", "lora"])
def test_which_weights_learn(mode: Any, inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    tuning = {"mode": mode, "num_top_layers": 1, "lora_rank": 2}
    finished(config_of(inputs, tmp_path, tuning=tuning, train={"num_steps": 2}), place)
    before, after = load_file(inputs[0] / "model.safetensors"), load_file(tmp_path / "last/encoder/model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before.get(name, before.get(f"esm.{name}")))}
    layers = {f"encoder.layer.{number}" for number in range(3) if any(f"layer.{number}." in name for name in changed)}
    attention = [name for name in changed if name.endswith(("query.weight", "key.weight", "value.weight"))]
    if mode == "full":
        assert len(layers) == 3
        assert any("embeddings" in name for name in changed)
    elif mode == "frozen":
        assert not changed
    elif mode == "top_layers":
        assert layers == {"encoder.layer.2"}
        assert changed - {name for name in changed if "layer.2." in name} == {
            "encoder.emb_layer_norm_after.weight",
            "encoder.emb_layer_norm_after.bias",
        }
    else:
        assert len(attention) == len(changed) == 9


def test_loras_merged_weights_predict_as_its_layers_did(
    inputs: tuple[Path, Path], tmp_path: Path, place: Place
) -> None:
    run = begun(config_of(inputs, tmp_path, tuning={"mode": "lora"}, optim={"lr": 0.05}), place)
    train(run, StopRequest())
    tuned = read_model(tmp_path / "last")
    proteins = gather_proteins(tuned.encoder.vocabulary, 0, [one.residues for one in run.valid])
    run.engine.deepspeed.eval()
    with torch.no_grad():
        expected = run.engine.deepspeed(proteins)
        assert torch.allclose(tuned.model(proteins), expected, atol=1e-5)
        assert not torch.allclose(read_model_before(inputs, run)(proteins), expected, atol=1e-2)


def read_model_before(inputs: tuple[Path, Path], run: Run) -> torch.nn.Module:
    """The run's head on the encoder it began with."""
    return run.task.build_model(load_encoder(inputs[0]), run.engine.model.head, True).eval()  # type: ignore[attr-defined]


def test_learning_rates_by_layer_and_step(inputs: tuple[Path, Path]) -> None:
    encoder = load_encoder(inputs[0])
    model = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(32, 3)})
    optim = OptimConfig(lr=1e-3, encoder_lr=1e-4, layer_decay=0.5, warmup_share=0.2, weight_decay=0.1)
    scales = {}
    for group in parameter_groups(Namespace(model), optim):
        for parameter in group["params"]:
            scales[id(parameter)] = (group["scale"], group["weight_decay"])
    heights = {"embeddings": 0.1 / 8, "layer.0.": 0.1 / 4, "layer.1.": 0.1 / 2, "layer.2.": 0.1, "after": 0.1}
    for name, parameter in encoder.named_parameters():
        if "contact_head" in name:  # transformers' own, never called
            continue
        expected = next(scale for part, scale in heights.items() if part in name)
        assert scales[id(parameter)] == (pytest.approx(expected), 0.1 if parameter.ndim > 1 else 0.0)
    assert scales[id(model["head"].weight)] == (1.0, 0.1)
    assert depth_of("model.encoder.layer.11.attention.self.query.weight", 33) == 12
    rates = [learning_rate(step, 10, optim) / 1e-3 for step in range(10)]
    assert rates == pytest.approx([1 / 2, 1, *(np.arange(8, 0, -1) / 9)])
    constant = replace(optim, decay="constant")
    assert [learning_rate(step, 10, constant) for step in (0, 1, 9)] == pytest.approx([5e-4, 1e-3, 1e-3])


class Namespace:
    """Gives a ModuleDict's members as attributes."""

    def __init__(self, members: torch.nn.ModuleDict) -> None:
        self.encoder, self.head, self.named_parameters = members["encoder"], members["head"], members.named_parameters


def test_impossible_tunings_are_one_sentence(inputs: tuple[Path, Path]) -> None:
    for tuning, sentence in (
        (TuningConfig(mode="top_layers", num_top_layers=9), "num_top_layers 9: the encoder has 3 layers"),
        (TuningConfig(mode="lora", lora_modules=["qkv"]), "linear layers are called dense, key, query, value"),
    ):
        with pytest.raises(InputError, match=sentence):
            prepare_encoder(load_encoder(inputs[0]), tuning)


@pytest.mark.parametrize("head", ["convolution", "tape"])
def test_heads_with_convolutions_train(head: str, inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    steps = {"num_steps": 15, "eval_interval": 0}
    config = config_of(inputs, tmp_path, optim={"lr": 3e-3}, train=steps)
    config = replace(config, head=HeadConfig(name=head, hidden_size=16))
    assert finished(config, place).is_finished
    losses = series(tmp_path, "loss")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_tensorboard_is_written_when_asked(inputs: tuple[Path, Path], tmp_path: Path, place: Place) -> None:
    finished(config_of(inputs, tmp_path, log=LogConfig(tensorboard=True), train={"num_steps": 1}), place)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    shutil.rmtree(tmp_path / "tensorboard")
