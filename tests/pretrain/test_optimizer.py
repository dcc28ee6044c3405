"""AdamW against torch's, which parameters decay, and the learning rate worked by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from megaprot.pretrain.config import OptimConfig
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.optimizer import AdamW, build_optimizer, learning_rate, set_learning_rate
from megaprot.pretrain.parallel import Place
from tests.pretrain.tiny import ESM, tiny_config

SHAPES = ((7, 5), (5,), (3, 4, 2), (1,))


def two_groups(seed: int) -> tuple[list[torch.nn.Parameter], list[dict[str, object]]]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    return parameters, groups


def test_adamw_equals_torchs_unfused_one_over_twenty_steps_with_a_changing_rate() -> None:
    ours, our_groups = two_groups(1)
    theirs, their_groups = two_groups(1)
    options = {"betas": (0.9, 0.98), "eps": 1e-8}
    mine = AdamW(our_groups, lr=1e-2, **options)
    reference = torch.optim.AdamW(their_groups, lr=1e-2, fused=False, foreach=False, **options)
    generator = torch.Generator().manual_seed(2)
    for step in range(20):
        for group, other in zip(mine.param_groups, reference.param_groups, strict=True):
            group["lr"] = other["lr"] = 1e-2 * (1 + step % 3)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator) * 10.0 ** (step % 5 - 2)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert [group["step"] for group in mine.param_groups] == [20, 20]


def test_adamw_leaves_parameters_without_a_gradient_alone() -> None:
    parameters, groups = two_groups(3)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = AdamW(groups)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])
    for parameter, old in zip(parameters[1:], before[1:], strict=True):
        assert torch.equal(parameter, old)
        assert not any(bool(moment.any()) for moment in optimizer.state[parameter].values())


def test_adamw_goes_on_from_its_saved_state_to_the_bit() -> None:
    parameters, groups = two_groups(4)
    copies, copied_groups = two_groups(4)
    generator = torch.Generator().manual_seed(5)
    optimizer = AdamW(groups)
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(6)]
    for number, step in enumerate(gradients):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if number == 2:
            saved = copy.deepcopy(optimizer.state_dict())  # loading shares its tensors
            for other, parameter in zip(copies, parameters, strict=True):
                other.data.copy_(parameter.data)
            resumed = AdamW(copied_groups)
            resumed.load_state_dict(saved)
        elif number > 2:
            for other, gradient in zip(copies, step, strict=True):
                other.grad = gradient
            resumed.step()
    for other, parameter in zip(copies, parameters, strict=True):
        assert torch.equal(other, parameter)


@pytest.mark.parametrize("distributed", [False, True])
def test_only_matrices_and_embeddings_decay(alone: Place, distributed: bool) -> None:
    config = tiny_config(
        model={"position_embedding": "learned", "initial_std": 0.5},
        optim={"weight_decay": 0.25},
        parallel={"distributed_optimizer": distributed},
    )
    chunks = build_model(config, transformer_config(config), ESM, alone)
    module = chunks[0].module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # else biases are zero and cannot show a decay
    optimizer = build_optimizer(config.optim, config.train, config.parallel, chunks)
    optimizer.reload_model_params()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    chunks[0].zero_grad_buffer()
    optimizer.prepare_grads()
    set_learning_rate(optimizer, 0.5)
    optimizer.step_with_ready_grads()
    for name, parameter in module.named_parameters():
        factor = 1.0 - 0.5 * 0.25 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(
            parameter.detach(), before[name] * factor, msg=lambda text, name=name: f"{name}: {text}"
        )


LINEAR = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, decay="linear")


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, 0.8), (8, 0.6), (12, 0.2), (13, 0.2), (1000, 0.2)],
)
def test_linear_decay_worked_by_hand(step: int, expected: float) -> None:
    assert learning_rate(step, LINEAR, num_steps=12) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    # 0.2 + 0.8 (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/3, 1/2, 1
    [(4, 1.0), (7, 0.6 + 0.4 * math.sqrt(0.5)), (8, 0.8), (10, 0.6), (16, 0.2), (40, 0.2)],
)
def test_cosine_decay_worked_by_hand(step: int, expected: float) -> None:
    assert learning_rate(step, replace(LINEAR, decay="cosine"), num_steps=16) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (2, 0.75), (4, 1.0), (11, 1.0), (500, 1.0)])
def test_constant_rate_worked_by_hand(step: int, expected: float) -> None:
    assert learning_rate(step, replace(LINEAR, decay="constant"), num_steps=12) == pytest.approx(expected)


def test_decay_ends_at_decay_steps_when_they_are_given() -> None:
    shorter = replace(LINEAR, decay_steps=8)
    assert [learning_rate(step, shorter, num_steps=100) for step in (4, 6, 8, 99)] == pytest.approx(
        [1.0, 0.6, 0.2, 0.2]
    )


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert learning_rate(0, replace(LINEAR, warmup_steps=0), num_steps=10) == 1.0


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    assert [learning_rate(step, LINEAR, num_steps=4) for step in (3, 4, 5)] == pytest.approx([1.0, 1.0, 0.2])
