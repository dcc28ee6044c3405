"""Half precision: bf16 stays close to fp32, fp16 finds its loss scale, and both repeat to the bit from their seed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.pretrain.blend import Blend
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.training import Training
from tests.pretrain.tiny import tiny_config, write_domains


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(write_domains(tmp_path_factory.mktemp("domains")) / "train")


def run_steps(config: PretrainConfig, domains: Corpus, place: Place) -> tuple[list[float], list[float], Training]:
    """Losses and gradient norms of the run's steps."""
    training = Training(config, Blend((domains,), (domains,)), place)
    results = [training.take_step(step, rows, [])[0] for step, rows, _ in training.steps()]
    return [result.tally.mean_loss for result in results], [result.grad_norm for result in results], training


def config_of(folder: Path, precision: str, **sections: dict[str, Any]) -> PretrainConfig:
    sections = {"model": {"num_layers": 2}, **sections}
    sections["train"] = {"precision": precision, "global_batch_rows": 4} | sections.get("train", {})
    sections["run"] = {"dir": str(folder / "run")} | sections.get("run", {})
    return tiny_config(**sections)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_fp32(domains: Corpus, alone: Place, tmp_path: Path, precision: str) -> None:
    exact = run_steps(config_of(tmp_path, "fp32"), domains, alone)
    rough = run_steps(config_of(tmp_path, precision, train={"initial_loss_scale": 1024.0}), domains, alone)
    assert rough[0] == pytest.approx(exact[0], rel=0.01)
    assert rough[1] == pytest.approx(exact[1], rel=0.1)
    assert rough[0] != exact[0]


def test_fp16_skips_overflowing_steps_lowers_the_scale_and_then_learns(
    domains: Corpus, alone: Place, tmp_path: Path
) -> None:
    config = config_of(tmp_path, "fp16", train={"initial_loss_scale": 2.0**18, "num_steps": 14})
    training = Training(config, Blend((domains,), (domains,)), alone)
    module = training.chunks[0].module
    scales, norms = [], []
    for step, rows, _ in training.steps():
        before = [parameter.detach().clone() for parameter in module.parameters()]
        scales.append(float(training.optimizer.get_loss_scale()))
        result, skipped = training.take_step(step, rows, [])
        norms.append(result.grad_norm)
        assert math.isfinite(result.tally.mean_loss)
        changed = any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
        assert changed == (not skipped) == math.isfinite(result.grad_norm)
    overflows = [math.isnan(norm) for norm in norms]
    assert overflows[:2] == [True, True]
    assert overflows.count(False) >= 4
    # megatron-core bears with one overflow (hysteresis 2), then halves the scale at each.
    expected, num_overflows = [], 0
    for is_overflow in overflows:
        expected.append(2.0 ** (18 - max(0, num_overflows - 1)))
        num_overflows += is_overflow
    assert scales == expected
    assert training.state.skipped_steps == num_overflows


@pytest.mark.parametrize(
    "model", [{}, {"hidden_dropout": 0.1, "attention_dropout": 0.1}], ids=["no dropout", "dropout"]
)
def test_a_bf16_run_repeats_to_the_bit_from_its_seed(
    domains: Corpus, alone: Place, tmp_path: Path, model: dict[str, float]
) -> None:
    def losses(seed: int) -> list[float]:
        config = config_of(tmp_path, "bf16", model={"num_layers": 2} | model, run={"seed": seed})
        return run_steps(config, domains, alone)[0]

    first, other, again = losses(1), losses(2), losses(1)
    assert first == again
    assert not set(first) & set(other)


def test_dropout_changes_the_loss_of_training_and_not_that_of_validation(
    domains: Corpus, alone: Place, tmp_path: Path
) -> None:
    plain = Training(config_of(tmp_path, "fp32"), Blend((domains,), (domains,)), alone)
    dropped = Training(
        config_of(tmp_path, "fp32", model={"num_layers": 2, "hidden_dropout": 0.3}),
        Blend((domains,), (domains,)),
        alone,
    )
    assert plain.validate() == dropped.validate()
    step, rows, _ = next(plain.steps())
    assert plain.take_step(step, rows, [])[0].tally.loss != dropped.take_step(step, rows, [])[0].tally.loss


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_draws_the_same_dropout_again(
    domains: Corpus, alone: Place, tmp_path: Path, recompute: str
) -> None:
    dropout = {"num_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    kept = run_steps(config_of(tmp_path, "fp32", model=dropout), domains, alone)
    again = run_steps(config_of(tmp_path, "fp32", model=dropout, train={"recompute": recompute}), domains, alone)
    assert again[0] == pytest.approx(kept[0], rel=1e-6)
    assert again[1] == pytest.approx(kept[1], rel=1e-6)
