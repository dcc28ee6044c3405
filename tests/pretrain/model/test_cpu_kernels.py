"""The CPU's elementwise kernels against torch in double precision, over values that are hard for their series."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu

from megaprot.pretrain.model import cpu_kernels
from megaprot.pretrain.model.cpu_threads import bits, on_all_threads
from megaprot.pretrain.model.feed_forward import TOKENS_AT_ONCE, CpuBiasGelu, bias_gelu

HALF_STEP = 2.0**-8  # relative distance of a number from the nearest bf16, at most
EVERYWHERE = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])


def error(found: Tensor, exact: Tensor) -> float:
    """Largest error relative to the value, or to 1e-4 of the largest value where that is more."""
    floor = 1e-4 * float(exact.abs().max())
    return float(((found.double() - exact).abs() / exact.abs().clamp(min=floor)).max())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_its_gradients_are_torchs_up_to_rounding(approximate: str) -> None:
    states = EVERYWHERE.bfloat16()[:, None].repeat(1, 3).requires_grad_()
    bias = torch.tensor([0.0, 1.5, -0.25]).bfloat16().requires_grad_()
    exact = gelu(states.double() + bias.double(), approximate=approximate)
    wanted = torch.randn(states.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = CpuBiasGelu.apply(states, bias, approximate == "tanh")
    assert error(found.detach(), exact.detach()) < 1.1 * HALF_STEP
    of_states, of_bias = torch.autograd.grad(found, (states, bias), wanted)
    exact_of_states, exact_of_bias = torch.autograd.grad(exact, (states, bias), wanted.double())
    # Where the slope crosses zero its error is one of the slope's terms, which are of size 1.
    assert float((of_states.double() - exact_of_states).abs().max()) < 2 * HALF_STEP * float(wanted.abs().max())
    assert error(of_states, exact_of_states.double()) < 10 * HALF_STEP
    assert error(of_bias, exact_of_bias.double()) < 2 * HALF_STEP


def test_gelu_of_many_tokens_is_the_same_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn((2 * TOKENS_AT_ONCE + 7, 1, 24), generator=generator).bfloat16()
    bias = torch.randn(24, generator=generator).bfloat16()
    before, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        inputs = states.clone().requires_grad_(), bias.clone().requires_grad_()
        output = CpuBiasGelu.apply(*inputs, False)
        found.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    torch.testing.assert_close(found[0][0], bias_gelu(states, bias, False), rtol=0.02, atol=0.01)


@settings(max_examples=50)
@given(
    length=st.integers(1, 70),
    num_queries=st.integers(1, 70),
    more=st.integers(0, 40),
    spread=st.sampled_from([0.1, 3.0, 200.0]),
    seed=st.integers(0, 9),
)
def test_softmax_and_its_gradient_are_torchs_and_zero_beyond_the_length(
    length: int, num_queries: int, more: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (spread * torch.randn((2, num_queries + more, length + more), generator=generator)).bfloat16()
    exact = torch.softmax(scores[:, :num_queries, :length].double(), dim=-1)
    cpu_kernels.softmax(bits(scores), num_queries, length)
    inside = scores[:, :num_queries, :length].double()
    assert float((inside - exact).abs().max()) < 2 * HALF_STEP
    assert not scores[:, num_queries:].any() and not scores[:, :, length:].any()
    gradients = torch.randn(scores.shape, generator=generator).bfloat16()
    of_inside = gradients[:, :num_queries, :length].double()
    exact_gradients = torch._softmax_backward_data(of_inside, inside, -1, torch.float64)
    cpu_kernels.softmax_backward(bits(scores), bits(gradients), num_queries)
    found = gradients[:, :num_queries, :length].double()
    torch.testing.assert_close(found, exact_gradients, rtol=2 * HALF_STEP, atol=1e-4)
    assert not gradients[:, num_queries:].any() and not gradients[:, :, length:].any()


def test_scattering_undoes_gathering() -> None:
    length, heads, size = 11, 3, 8
    states = torch.randn((20, heads, 2 * size), generator=torch.Generator().manual_seed(2)).bfloat16()[..., size:]
    angles = np.random.default_rng(0).uniform(0, 6, (length, size // 2)).astype(np.float32).repeat(2, axis=0)
    angles = np.concatenate([angles[:length], angles[:length]], axis=1)
    cos, sin = np.cos(angles), np.sin(angles)
    gathered = torch.full((heads, 16, size), 7.0).bfloat16()
    memory = bits(states.as_strided((20 * heads * 2 * size - size,), (1,)))
    cpu_kernels.gather_heads(
        memory, 4 * heads * 2 * size, heads * 2 * size, 2 * size, cos, sin, np.float32(0.5), length, bits(gathered)
    )
    assert not gathered[:, length:].any()
    back = torch.empty(length, heads, size).bfloat16()
    cpu_kernels.scatter_heads(bits(gathered), cos, sin, np.float32(2), bits(back))
    torch.testing.assert_close(back.double(), states[4 : 4 + length].double(), rtol=0, atol=0.02)


def test_jobs_are_all_done_and_their_results_in_order() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert on_all_threads([lambda number=number: number * number for number in range(50)]) == [n * n for n in range(50)]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_an_error_in_any_job_comes_through() -> None:
    def fail() -> None:
        raise ValueError("a job")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for jobs in ([fail, int, int], [int, int, fail], [fail, fail]):
        with pytest.raises(ValueError, match="a job"):
            on_all_threads(jobs)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
