"""Checkpoints saved under any layout become the model they hold; what is imported loads under any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaprot.pretrain.config import ModelConfig
from tests.pretrain.model.hf_weights import from_esm
from tests.pretrain.model.oracles import esm_for_masked_lm, logits_alone
from tests.pretrain.tiny import ESM, random_sequences, split_by_sequence, tiny_config
from tests.tools.conversion.models import (
    SMALL,
    assert_same_tensors,
    converted,
    fair_esm_of,
    largest_difference,
    loaded,
    tensors_of,
)
from tests.tools.conversion.saving import run_tasks

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1PP1": {},
    "TP2PP1": {"tensor": 2},
    "TP1PP2": {"pipeline": 2},
    "TP2PP2": {"tensor": 2, "pipeline": 2},
    "TP2PP2 interleaved": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    "TP4": {"tensor": 4},
    "uneven stages": {"pipeline": 2, "pipeline_layout": [1, 3]},
    "sharded optimizer": {"tensor": 2, "pipeline": 2, "distributed_optimizer": True},
}
SHAPES = {
    "8M": ModelConfig(num_layers=6, hidden_size=320, num_attention_heads=20, token_dropout=True),
    "35M": ModelConfig(num_layers=12, hidden_size=480, num_attention_heads=20, token_dropout=True),
}
ROW_TOKENS = 192
SEQUENCES = random_sequences((5, 60, 37), seed=4) + random_sequences((50, 33), seed=5, mask_share=0.0)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """The model whose weights are saved under every layout."""
    return esm_for_masked_lm(SMALL, 80)


def calm(model: nn.Module) -> nn.Module:
    """The model with smaller matrices: deep ones with the oracles' large ones blow rounding errors up."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    return model


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Random ESM-2s of published shapes, converted to checkpoints."""
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for name, shape in SHAPES.items():
        theirs = calm(esm_for_masked_lm(shape, 1024))
        theirs.save_pretrained(folder / f"{name} transformers")
        step = converted(folder / f"{name} transformers", folder / name, "megatron", "--vocabulary", "esm")
        found[name] = step, theirs
    return found


@pytest.fixture(scope="module")
def done(
    original: nn.Module, imported: dict[str, tuple[Path, nn.Module]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Tensor]]]:
    """Runs saved under every layout, below one folder, and logits of the imported models by shape."""
    folder = tmp_path_factory.mktemp("saved")
    weights = from_esm(original.state_dict(), SMALL.num_attention_heads)
    model = {
        key: getattr(SMALL, key) for key in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
    }
    tasks: list[tuple[Any, dict[str, Any]]] = []
    for name, layout in LAYOUTS.items():
        more = {"weights": weights, "folder": str(folder / name / "checkpoints")}
        tasks.append((tiny_config(model=model, parallel=layout), more))
    for name, (step, _) in imported.items():
        shape = vars(SHAPES[name])
        more = {"folder": str(step), "sequences": SEQUENCES, "row_tokens": ROW_TOKENS}
        config = tiny_config(model=shape, parallel=LAYOUTS["TP2PP2"], data={"max_sequence_length": 1024})
        tasks.append((config, more))
    return folder, dict(zip(imported, run_tasks(tasks, folder)[len(LAYOUTS) :], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_under_any_layout_becomes_the_same_model(
    layout: str, original: nn.Module, done: tuple[Path, Any], tmp_path: Path
) -> None:
    run = done[0] / layout
    found = loaded(converted(run, tmp_path / "hf", "hf"))
    expected = original.state_dict()
    for name, tensor in found.state_dict().items():
        if "contact_head" not in name:  # which a run does not train
            assert torch.equal(tensor, expected[name]), name
    assert largest_difference(logits_alone(found, SEQUENCES), logits_alone(original, SEQUENCES)) < 1e-5
    back = converted(tmp_path / "hf", tmp_path / "back", "megatron")
    before, after = tensors_of(run / "checkpoints" / "step_00000000"), tensors_of(back)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_model_gives_transformers_logits_under_tp2_pp2(
    shape: str, imported: dict[str, tuple[Path, nn.Module]], done: tuple[Path, dict[str, list[Tensor]]]
) -> None:
    whole = torch.cat(done[1][shape], dim=1)[:, : ESM.size]
    expected = logits_alone(imported[shape][1], SEQUENCES)
    assert largest_difference(split_by_sequence(whole, SEQUENCES), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_model_gives_fair_esms_logits_under_tp2_pp2(
    shape: str, imported: dict[str, tuple[Path, nn.Module]], done: tuple[Path, dict[str, list[Tensor]]]
) -> None:
    whole = torch.cat(done[1][shape], dim=1)[:, : ESM.size]
    fair = fair_esm_of(imported[shape][1])
    with torch.no_grad():
        expected = [fair(torch.tensor([sequence]))["logits"][0] for sequence in SEQUENCES]
    assert largest_difference(split_by_sequence(whole, SEQUENCES), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_model_comes_back_bit_for_bit(
    shape: str, imported: dict[str, tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    step, theirs = imported[shape]
    assert_same_tensors(loaded(converted(step, tmp_path / "hf", "hf")), theirs)
