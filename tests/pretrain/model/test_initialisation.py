"""Start values: a pure function of (seed, name), of the announced spread, and complete."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.model.initialisation import initial_tensor, initialise, parameter_seed
from megaprot.pretrain.parallel import Place
from tests.pretrain.tiny import ESM, tiny_config

QKV = "encoder.layers.0.self_attention.linear_qkv.weight"


def parameters_of(place: Place, seed: int = 1, **sections: Any) -> dict[str, torch.Tensor]:
    config = tiny_config(run={"seed": seed}, **sections)
    module = build_model(config, transformer_config(config), ESM, place)[0].module
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}


@given(seed=st.integers(0, 2**40), name=st.text(min_size=1, max_size=40))
def test_parameter_seeds_are_valid_and_repeatable(seed: int, name: str) -> None:
    assert 0 <= parameter_seed(seed, name) < 2**63
    assert parameter_seed(seed, name) == parameter_seed(seed, name)
    assert parameter_seed(seed, name) != parameter_seed(seed + 1, name)
    assert parameter_seed(seed, name) != parameter_seed(seed, name + "x")


def test_start_values_do_not_depend_on_the_global_generator_nor_move_it() -> None:
    torch.manual_seed(1)
    first = initial_tensor(QKV, (192, 64), 5, 0.02, 4)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = initial_tensor(QKV, (192, 64), 5, 0.02, 4)
    torch.manual_seed(1)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_matrices_have_the_announced_spread_and_norms_and_biases_are_plain(alone: Place) -> None:
    std, num_layers = 0.05, 4
    parameters = parameters_of(alone, model={"initial_std": std, "position_embedding": "learned"})
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            plain = torch.ones if "norm" in name and name.endswith("weight") else torch.zeros
            assert torch.equal(parameter, plain(parameter.shape)), name
            continue
        is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = std / math.sqrt(2 * num_layers) if is_output else std
        # Six standard errors of a standard deviation and of a mean over n values.
        assert float(parameter.std()) == pytest.approx(expected, abs=6 * expected / math.sqrt(2 * parameter.numel())), (
            name
        )
        assert float(parameter.mean()) == pytest.approx(0.0, abs=6 * expected / math.sqrt(parameter.numel())), name


def test_no_two_parameters_start_alike_and_another_seed_gives_other_weights(alone: Place) -> None:
    parameters = {name: part for name, part in parameters_of(alone).items() if part.ndim == 2}
    firsts = {tuple(part.flatten()[:8].tolist()) for part in parameters.values()}
    assert len(firsts) == len(parameters)
    others = parameters_of(alone, seed=2)
    assert not any(torch.equal(part, others[name]) for name, part in parameters.items())


def test_weights_of_a_layer_do_not_depend_on_the_depth_but_for_the_scaled_projections(alone: Place) -> None:
    deep, shallow = parameters_of(alone), parameters_of(alone, model={"num_layers": 2})
    for name, part in shallow.items():
        is_scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        torch.testing.assert_close(part, deep[name] * (math.sqrt(2.0) if is_scaled else 1.0))


def test_bf16_starts_from_the_rounded_fp32_weights(alone: Place) -> None:
    exact, rounded = parameters_of(alone), parameters_of(alone, train={"precision": "bf16"})
    for name, part in rounded.items():
        assert part.dtype == torch.bfloat16
        assert torch.equal(part, exact[name].bfloat16()), name


def test_a_parameter_that_no_checkpoint_knows_is_refused(alone: Place) -> None:
    config = tiny_config()
    module = build_model(config, transformer_config(config), ESM, alone)[0].module
    described = module.sharded_state_dict

    def without_the_final_norm(**options: Any) -> Any:
        return {name: part for name, part in described(**options).items() if "final_layernorm" not in name}

    module.sharded_state_dict = without_the_final_norm
    with pytest.raises(AssertionError, match="initialised"):
        initialise(module, 1, 0.02, 4)
