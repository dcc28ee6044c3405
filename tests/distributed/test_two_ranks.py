"""A model over two tensor-parallel ranks: other libraries' outputs, and dropout that differs just where it should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaprot.common.vocabulary import get_vocabulary
from tests.distributed.sharded_model import run_tasks
from tests.pretrain.model.hf_weights import from_esm, from_megatron_bert
from tests.pretrain.model.oracles import esm_for_masked_lm, hidden_states_alone, logits_alone, megatron_bert
from tests.pretrain.tiny import ESM, random_sequences, split_by_sequence, tiny_config

pytestmark = pytest.mark.slow

PROTEINLM = get_vocabulary("proteinlm")
SEQUENCES = random_sequences((30, 3, 61, 17, 2), seed=1)  # 15 places of padding in the row
TWO = {"tensor": 2}
TWO_SP = {"tensor": 2, "sequence": True}
PARALLEL = {"TP2": TWO, "TP2 SP": TWO_SP}
ESM_MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "rotary with token dropout": {"token_dropout": True},
    "learned": {"position_embedding": "learned"},
    "learned with token dropout": {"position_embedding": "learned", "token_dropout": True},
}
TANH = {"position_embedding": "learned", "activation": "gelu_tanh"}
PROBABILITY = 0.25
DROPOUT = {"hidden_dropout": PROBABILITY, "attention_dropout": PROBABILITY}


def esm_oracle(name: str) -> Any:
    return esm_for_masked_lm(tiny_config(model=ESM_MODELS[name]).model, num_positions=80)


def megatron_oracle() -> Any:
    return megatron_bert(tiny_config(model=TANH).model, 80, PROTEINLM.size, "gelu_new")


def proteinlm_sequences() -> list[list[int]]:
    return random_sequences((30, 3, 61, 17, 2), seed=1, vocabulary=PROTEINLM)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """By task: what each of the two ranks computed."""
    tasks: dict[str, Any] = {}
    for layout, parallel in PARALLEL.items():
        for name, model in ESM_MODELS.items():
            weights = from_esm(esm_oracle(name).state_dict(), 4)
            more = {"weights": weights, "sequences": SEQUENCES, "vocabulary": "esm"}
            tasks[f"{name} {layout}"] = "outputs", tiny_config(model=model, parallel=parallel), more
        weights = from_megatron_bert(megatron_oracle().state_dict(), 4)
        more = {"weights": weights, "sequences": proteinlm_sequences(), "vocabulary": "proteinlm"}
        tasks[f"megatron {layout}"] = "outputs", tiny_config(model=TANH, parallel=parallel), more
    for layout, parallel in {"DP2": {}, **PARALLEL}.items():
        tasks[f"masks {layout}"] = "masks", tiny_config(model=DROPOUT, parallel=parallel), {}
    dropped = tiny_config(model=DROPOUT, parallel=TWO)
    tasks["hidden"] = "hidden", dropped, {"sequences": SEQUENCES}
    tasks["hidden without dropout"] = "hidden", tiny_config(parallel=TWO), {"sequences": SEQUENCES}
    tasks["attention"] = "attention", dropped, {}
    return run_tasks(tasks, 2, Path(tmp_path_factory.mktemp("tasks")))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", PARALLEL)
@pytest.mark.parametrize("name", ESM_MODELS)
def test_logits_equal_those_of_esm_for_masked_lm(found: dict[str, Any], name: str, layout: str) -> None:
    logits = torch.cat([rank["logits"] for rank in found[f"{name} {layout}"]], dim=1)
    assert logits.shape == (128, 128)
    assert bool(torch.isneginf(logits[:, ESM.size :]).all())
    assert_equal(split_by_sequence(logits[:, : ESM.size], SEQUENCES), logits_alone(esm_oracle(name), SEQUENCES))


@pytest.mark.parametrize("layout", PARALLEL)
def test_hidden_states_equal_those_of_megatron_bert(found: dict[str, Any], layout: str) -> None:
    by_rank = [rank["hidden"] for rank in found[f"megatron {layout}"]]
    if layout == "TP2":
        assert torch.equal(*by_rank)
    hidden = by_rank[0] if layout == "TP2" else torch.cat(by_rank)
    sequences = proteinlm_sequences()
    assert_equal(split_by_sequence(hidden, sequences), hidden_states_alone(megatron_oracle(), sequences))


def test_replicas_of_the_residual_stream_stay_equal_under_dropout(found: dict[str, Any]) -> None:
    first, second = (rank["hidden"] for rank in found["hidden"])
    assert torch.equal(first, second)
    plain = found["hidden without dropout"][0]["hidden"]
    assert all(not torch.equal(layer, other) for layer, other in zip(first, plain, strict=True))


def test_attention_dropout_differs_between_the_heads_of_two_ranks(found: dict[str, Any]) -> None:
    first, second = found["attention"]
    assert torch.equal(first["plain"], second["plain"])
    assert float((first["dropout"] - second["dropout"]).abs().mean()) > 0.01
    assert torch.equal(first["following"], second["following"])  # their common state stays common


@pytest.mark.parametrize(("layout", "are_equal"), [("TP2", True), ("TP2 SP", False), ("DP2", False)])
def test_residual_dropout_of_two_ranks_is_equal_only_where_they_hold_replicas(
    found: dict[str, Any], layout: str, are_equal: bool
) -> None:
    first, second = (rank["step 1"] for rank in found[f"masks {layout}"])
    assert first.shape == second.shape == (2, 5, 64 if layout == "TP2 SP" else 128, 64)
    for mine, other in zip(first.flatten(0, 1), second.flatten(0, 1), strict=True):
        agreement = float((mine == other).float().mean())
        chance = PROBABILITY**2 + (1 - PROBABILITY) ** 2
        assert agreement == 1.0 if are_equal else agreement == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("layout", ["DP2", "TP2", "TP2 SP"])
def test_residual_dropout_drops_its_share_anew_in_every_layer_row_and_step(found: dict[str, Any], layout: str) -> None:
    for rank in found[f"masks {layout}"]:
        assert torch.equal(rank["step 1"], rank["step 1 again"])
        masks = torch.cat((rank["step 1"], rank["step 2"])).flatten(0, 1).flatten(1).float()
        assert masks.mean(dim=1).tolist() == pytest.approx([1 - PROBABILITY] * len(masks), abs=0.03)
        # Independent masks: no two of them are correlated.
        correlation = torch.corrcoef(masks) - torch.eye(len(masks))
        assert float(correlation.abs().max()) < 0.08
