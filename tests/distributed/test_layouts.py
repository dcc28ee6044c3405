"""Every layout computes the same: losses, gradient norms and weights of five steps equal those of one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.pretrain.config import PretrainConfig
from tests.distributed.layouts import run_layouts
from tests.pretrain.tiny import tiny_config, write_domains

pytestmark = pytest.mark.slow

FIVE_LAYERS = {"num_layers": 5}
LEARNED = {"position_embedding": "learned", "activation": "gelu_tanh"}
TOKEN_DROPOUT = {"token_dropout": True}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
SHARDED = {"distributed_optimizer": True}
# The one-process runs that layouts are held against.
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "five layers": FIVE_LAYERS,
    "learned": LEARNED,
    "token dropout": TOKEN_DROPOUT,
}


def layout(
    model: str, tensor: int = 1, pipeline: int = 1, virtual: int = 1, recompute: str = "none", **more: Any
) -> tuple[str, PretrainConfig]:
    """(model, configuration of it under a layout)."""
    parallel = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual} | more
    return model, tiny_config(model=MODELS[model], parallel=parallel, train={"recompute": recompute})


ON_FOUR = {
    "DP4": layout("rotary"),
    "DP4 distributed optimizer": layout("rotary", **SHARDED),
    "TP2 DP2": layout("rotary", 2),
    "TP2 DP2 distributed optimizer": layout("rotary", 2, **SHARDED),
    "TP2 SP DP2 distributed optimizer": layout("rotary", 2, sequence=True, **SHARDED),
    "TP4": layout("rotary", 4),
    "TP4 SP": layout("rotary", 4, sequence=True),
    "PP2 DP2": layout("rotary", 1, 2),
    "PP2 DP2 distributed optimizer": layout("rotary", 1, 2, **SHARDED),
    "PP4": layout("rotary", 1, 4),
    "TP2 PP2": layout("rotary", 2, 2),
    "TP2 PP2 SP": layout("rotary", 2, 2, sequence=True),
    "PP2 VPP2 DP2": layout("rotary", 1, 2, 2),
    "PP2 VPP2 DP2 distributed optimizer": layout("rotary", 1, 2, 2, **SHARDED),
    "TP2 PP2 VPP2 SP distributed optimizer": layout("rotary", 2, 2, 2, sequence=True, **SHARDED),
    "PP2 DP2 stages of 1 and 3": layout("rotary", 1, 2, pipeline_layout=[1, 3]),
    "TP2 PP2 SP stages of 3 and 1": layout("rotary", 2, 2, sequence=True, pipeline_layout=[3, 1]),
    "PP4 of 5 layers": layout("five layers", 1, 4),
    "TP2 PP2 VPP2 SP of 5 layers": layout("five layers", 2, 2, 2, sequence=True),
    "PP2 VPP2 DP2 chunks of 1, 1, 2 and 1": layout("five layers", 1, 2, 2, pipeline_layout=[1, 1, 2, 1]),
    "TP2 PP2 recomputing all": layout("rotary", 2, 2, recompute="full"),
    "TP2 SP DP2 recomputing attention": layout("rotary", 2, sequence=True, recompute="selective"),
    "PP2 VPP2 DP2 recomputing all": layout("rotary", 1, 2, 2, recompute="full"),
    "learned TP2 PP2 SP": layout("learned", 2, 2, sequence=True),
    "learned TP4 SP": layout("learned", 4, sequence=True),
    "learned PP2 VPP2 DP2 distributed optimizer": layout("learned", 1, 2, 2, **SHARDED),
    "token dropout TP2 SP DP2": layout("token dropout", 2, sequence=True),
    "token dropout TP2 PP2": layout("token dropout", 2, 2),
}
ON_EIGHT = {
    "TP2 PP2 DP2 SP distributed optimizer": layout("rotary", 2, 2, sequence=True, **SHARDED),
    "TP2 PP2 VPP2 DP2 SP distributed optimizer": layout("rotary", 2, 2, 2, sequence=True, **SHARDED),
    "TP4 PP2 SP": layout("rotary", 4, 2, sequence=True),
    "TP2 PP4": layout("rotary", 2, 4),
    "learned TP2 PP2 DP2 SP distributed optimizer": layout("learned", 2, 2, sequence=True, **SHARDED),
    "token dropout TP4 PP2 SP": layout("token dropout", 4, 2, sequence=True),
}


def random_run(seed: int, model: dict[str, float], **train: Any) -> PretrainConfig:
    """A run of three steps over four processes whose losses depend on its random numbers or its rounding."""
    return tiny_config(
        model=model,
        parallel={"tensor": 2, "pipeline": 2, "sequence": True, "distributed_optimizer": True},
        train={"num_steps": 3} | train,
        run={"seed": seed},
    )


# Each run comes twice with others between, so that nothing left behind by a run can make the second one equal.
REPEATED = {
    f"{kind} seed {seed} time {time}": random_run(seed, model, precision=precision)
    for time, seed in ((1, 1), (1, 2), (2, 1))
    for kind, precision, model in (("bf16", "bf16", {}), ("dropout", "fp32", DROPOUT), ("both", "bf16", DROPOUT))
}
OTHERS = {
    "dropout recomputing all": random_run(1, DROPOUT, recompute="full"),
    "dropout recomputing attention": random_run(1, DROPOUT, recompute="selective"),
    "fp16": random_run(1, {}, precision="fp16", num_steps=8, initial_loss_scale=2.0**14),
}


def by_sizes(cases: dict[str, PretrainConfig]) -> dict[str, PretrainConfig]:
    """The same cases, those that share process groups one after another."""
    sizes = ("tensor", "pipeline", "virtual_pipeline")
    return dict(sorted(cases.items(), key=lambda case: [getattr(case[1].parallel, name) for name in sizes]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus of the runs, and where they leave their weights."""
    folder = tmp_path_factory.mktemp("layouts")
    write_domains(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Any]:
    cases = {name: tiny_config(model=model) for name, model in MODELS.items()}
    return run_layouts(cases, 1, folder / "corpus", folder / "weights1")


@pytest.fixture(scope="module")
def on_four(folder: Path) -> dict[str, Any]:
    cases = {name: config for name, (_, config) in ON_FOUR.items()}
    return run_layouts(by_sizes(cases) | REPEATED | OTHERS, 4, folder / "corpus", folder / "weights4")


@pytest.fixture(scope="module")
def on_eight(folder: Path) -> dict[str, Any]:
    cases = {name: config for name, (_, config) in ON_EIGHT.items()}
    return run_layouts(by_sizes(cases), 8, folder / "corpus", folder / "weights8")


def assert_agreement(found: dict[str, Any], expected: dict[str, Any], num_processes: int) -> None:
    assert found["unequal_replicas"] == []
    assert len(found["losses"]) == len(expected["losses"]) == 5
    assert found["counts"] == expected["counts"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5)
    for name, value in expected["validation"].items():
        assert found["validation"][name] == pytest.approx(value, rel=1e-5), name
    assert found["requests"] == [num_processes] * 5


def assert_equal_weights(folder: Path, num_processes: int, name: str, model: str) -> None:
    """A norm can hide a permutation; weights after five steps cannot."""
    weights = torch.load(folder / f"weights{num_processes}" / f"{name}.pt", weights_only=True)
    expected = torch.load(folder / "weights1" / f"{model}.pt", weights_only=True)
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            weights[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_five_steps_change_every_weight_by_far_more_than_the_tolerance(
    folder: Path, references: dict[str, Any]
) -> None:
    """Else equal weights would say nothing."""
    for model, result in references.items():
        assert result["losses"][4] < result["losses"][0]
        assert len(set(result["grad_norms"])) == 5
        end = torch.load(folder / "weights1" / f"{model}.pt", weights_only=True)
        moved = {key for key, tensor in end.items() if "norm" in key and key.endswith("weight")}
        assert moved
        for key in moved:
            assert float((end[key] - 1.0).abs().max()) > 1e-4, key


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_compute_what_one_does(
    folder: Path, references: dict[str, Any], on_four: dict[str, Any], name: str
) -> None:
    model = ON_FOUR[name][0]
    assert_agreement(on_four[name], references[model], 4)
    assert_equal_weights(folder, 4, name, model)


@pytest.mark.parametrize("name", ON_EIGHT)
def test_eight_processes_compute_what_one_does(
    folder: Path, references: dict[str, Any], on_eight: dict[str, Any], name: str
) -> None:
    model = ON_EIGHT[name][0]
    assert_agreement(on_eight[name], references[model], 8)
    assert_equal_weights(folder, 8, name, model)


@pytest.mark.parametrize("kind", ["bf16", "dropout", "both"])
def test_runs_with_rounding_and_dropout_repeat_to_the_bit_from_their_seed(
    folder: Path, on_four: dict[str, Any], kind: str
) -> None:
    first, again, other = (on_four[f"{kind} seed {run}"] for run in ("1 time 1", "1 time 2", "2 time 1"))
    assert first["losses"] == again["losses"]
    assert first["grad_norms"] == again["grad_norms"]
    assert not set(first["losses"]) & set(other["losses"])
    weights = [torch.load(folder / "weights4" / f"{kind} seed 1 time {time}.pt", weights_only=True) for time in (1, 2)]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.parametrize("recomputed", ["all", "attention"])
def test_recomputation_draws_the_same_dropout_again_on_every_rank(on_four: dict[str, Any], recomputed: str) -> None:
    kept, again = on_four["dropout seed 1 time 1"], on_four[f"dropout recomputing {recomputed}"]
    assert again["losses"] == pytest.approx(kept["losses"], rel=1e-6)
    assert again["grad_norms"] == pytest.approx(kept["grad_norms"], rel=1e-6)


def test_an_fp16_overflow_on_any_rank_skips_the_step_on_all(on_four: dict[str, Any]) -> None:
    overflowed = [math.isnan(norm) for norm in on_four["fp16"]["grad_norms"]]
    assert overflowed[:2] == [True, True]
    assert overflowed[-1] is False
    losses = on_four["fp16"]["losses"]
    assert all(map(math.isfinite, losses))
    assert on_four["fp16"]["unequal_replicas"] == []


@pytest.mark.gpu
def test_one_gpu_computes_what_one_cpu_process_does(folder: Path, references: dict[str, Any]) -> None:
    cases = {
        "fp32": tiny_config(),
        "fp32 distributed optimizer": tiny_config(parallel=SHARDED),
        "fp32 overlapping": tiny_config(parallel=SHARDED | {"overlap_communication": True}),
        "bf16 varlen": tiny_config(model={"attention_backend": "varlen"}, train={"precision": "bf16"}),
    }
    found = run_layouts(cases, 1, folder / "corpus", folder / "weights_gpu", use_cuda=True)
    expected = references["rotary"]
    for name, result in found.items():
        tolerance = 1e-4 if name.startswith("fp32") else 1e-2
        assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance), name
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=10 * tolerance), name
