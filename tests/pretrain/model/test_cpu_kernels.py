"""The CPU's elementwise kernels against torch in double precision, over values that are hard for their series."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from megaprot.pretrain.model.cpu_threads import on_all_threads
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
