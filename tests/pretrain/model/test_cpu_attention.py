"""The CPU's attention against rotation and softmax(Q K^T / sqrt(d)) V written out in double precision."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model import cpu_attention_kernels
from megaprot.pretrain.model.attention import resolve_backend, rotary_table
from megaprot.pretrain.model.cpu_attention import SegmentAttention
from megaprot.pretrain.model.cpu_attention_kernels import LANES
from megaprot.pretrain.model.cpu_kernels import gather_heads, scatter_heads
from megaprot.pretrain.model.cpu_threads import bits

SEGMENTS = (1, 7, 40, 13, 2)
EVERY_TOKEN = tuple(range(sum(SEGMENTS)))
# No token of the first and the last but one segment; one of the last three times, as unused places of a row are.
SOME_TOKENS = (2, 3, 7, *range(8, 48, 3), 61, 62, 62, 62)
NUM_HEADS, HEAD_SIZE = 3, 8


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def states(seed: int, queries: Sequence[int] = EVERY_TOKEN) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as views of one tensor, as the fused projection leaves them; some queries of it."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(sum(SEGMENTS), NUM_HEADS, 3 * HEAD_SIZE, generator=generator).bfloat16()
    query, key, value = (part.detach() for part in mixed.chunk(3, dim=-1))
    query = query if len(queries) == len(query) else query[list(queries)]
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def positions() -> Tensor:
    """Return the position of each token, restarting in each segment."""
    return torch.cat([torch.arange(length) for length in SEGMENTS])


def segments() -> Tensor:
    """Return the number of each token's segment."""
    return torch.repeat_interleave(torch.arange(len(SEGMENTS)), torch.tensor(SEGMENTS))


def attend(inputs: tuple[Tensor, Tensor, Tensor], has_rotary: bool, queries: Sequence[int] = EVERY_TOKEN) -> Tensor:
    """Return what the kernel makes of them."""
    chosen = torch.tensor(queries)
    lengths = tuple(torch.bincount(segments()[chosen], minlength=len(SEGMENTS)).tolist())
    rotations = [
        rotary_table(places, HEAD_SIZE) if has_rotary else None for places in (positions()[chosen], positions())
    ]
    attended = SegmentAttention.apply(*inputs, *rotations, lengths, SEGMENTS)
    assert isinstance(attended, Tensor)
    return attended


def rotated(states: Tensor, positions: Tensor, has_rotary: bool) -> Tensor:
    """Turn channels c and c + HEAD_SIZE / 2, as one complex number, by position * 10000^(-2 c / HEAD_SIZE)."""
    if not has_rotary:
        return states.double()
    half = HEAD_SIZE // 2
    angles = positions.double()[:, None, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(*states.double().split(half, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive(query: Tensor, key: Tensor, value: Tensor, has_rotary: bool, queries: Sequence[int]) -> Tensor:
    """Attend head by head and token by token over the tokens of the same segment, in double precision."""
    query = rotated(query, positions()[list(queries)], has_rotary)
    key, value = rotated(key, positions(), has_rotary), value.double()
    rows = []
    for number, token in enumerate(queries):
        same = segments() == segments()[token]
        heads = []
        for head in range(NUM_HEADS):
            scores = (key[same, head] * query[number, head]).sum(-1) / math.sqrt(HEAD_SIZE)
            weights = scores.exp() / scores.exp().sum()
            heads.append((weights[:, None] * value[same, head]).sum(0))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("has_rotary", [True, False], ids=["rotary", "learned"])
@pytest.mark.parametrize("queries", [EVERY_TOKEN, SOME_TOKENS], ids=["every token", "some tokens"])
def test_outputs_and_gradients_are_those_of_attention_written_out(
    queries: tuple[int, ...],
    has_rotary: bool,
    threads: int,
) -> None:
    inputs = states(1, queries)
    attended = attend(inputs, has_rotary, queries)
    expected = naive(*inputs, has_rotary, queries)
    wanted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = (attended, *torch.autograd.grad(attended, inputs, wanted))
    references = (expected, *torch.autograd.grad(expected, inputs, wanted.double()))
    for mine, reference in zip(found, references, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.detach().double() - reference.detach()).norm() / reference.detach().norm()) < 1e-2


@settings(max_examples=60)
@given(
    length=st.integers(1, 70),
    num_queries=st.integers(1, 70),
    head_size=st.sampled_from([2, 6, 16, 20, 24, 40]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_a_segment_of_any_size_and_any_scores_is_that_of_softmax_in_double_precision(
    length: int, num_queries: int, head_size: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [-(-number // LANES) * LANES for number in (num_queries, length, length, num_queries)]
    query, key, value, of_output = (torch.zeros(2, number, head_size).bfloat16() for number in rows)
    for states, number, scale in ((query, num_queries, spread), (key, length, 1), (value, length, 1)):
        states[:, :number] = scale * torch.randn((2, number, head_size), generator=generator)
    of_output[:, :num_queries] = torch.randn((2, num_queries, head_size), generator=generator)
    inputs = [states[:, :number].double().requires_grad_() for states, number in zip(
        (query, key, value), (num_queries, length, length), strict=True)]  # fmt: skip
    expected = torch.softmax(inputs[0] @ inputs[1].transpose(1, 2), dim=-1) @ inputs[2]
    references = [expected, *torch.autograd.grad(expected, inputs, of_output[:, :num_queries].double())]
    output, log_sums = torch.empty_like(query), torch.empty(2, rows[0])
    cpu_attention_kernels.attend(*map(bits, (query, key, value)), num_queries, length, bits(output), log_sums.numpy())
    sums = torch.logsumexp(inputs[0] @ inputs[1].transpose(1, 2), dim=-1)
    torch.testing.assert_close(log_sums[:, :num_queries].double(), sums.detach(), rtol=1e-5, atol=1e-4)
    made = [torch.empty_like(states) for states in (query, key, value)]
    states_given = map(bits, (query, key, value, of_output))
    cpu_attention_kernels.attend_backward(*states_given, log_sums.numpy(), num_queries, length, *map(bits, made))
    for found, reference, number in zip((output, *made), references, (num_queries,) * 2 + (length,) * 2, strict=True):
        mine, exact = found[:, :number].double(), reference.detach()
        # Weights and slopes are rounded to bf16 before they are summed: an error of each term's size.
        assert float((mine - exact).norm()) <= 8e-3 * float(exact.norm()) + 2e-3 * spread


def test_scattering_undoes_gathering() -> None:
    length, heads, size = 11, 3, 8
    states = torch.randn((20, heads, 2 * size), generator=torch.Generator().manual_seed(2)).bfloat16()[..., size:]
    angles = np.random.default_rng(0).uniform(0, 6, (length, size // 2)).astype(np.float32).repeat(2, axis=0)
    angles = np.concatenate([angles[:length], angles[:length]], axis=1)
    cos, sin = np.cos(angles), np.sin(angles)
    gathered = torch.full((heads, 16, size), 7.0).bfloat16()
    memory = bits(states.as_strided((20 * heads * 2 * size - size,), (1,)))
    gather_heads(
        memory, 4 * heads * 2 * size, heads * 2 * size, 2 * size, cos, sin, np.float32(0.5), length, bits(gathered)
    )
    assert not gathered[:, length:].any()
    back = torch.empty(length, heads, size).bfloat16()
    scatter_heads(bits(gathered), cos, sin, np.float32(2), bits(back))
    torch.testing.assert_close(back.double(), states[4 : 4 + length].double(), rtol=0, atol=0.02)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        inputs = states(4)
        attended = attend(inputs, has_rotary=True)
        found.append((attended, *torch.autograd.grad(attended.float().square().sum(), inputs)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_gradient_of_any_strides_is_taken() -> None:
    found = []
    for is_expanded in (True, False):
        inputs = states(5)
        attended = attend(inputs, has_rotary=False)
        gradient = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand(attended.shape)
        found.append(torch.autograd.grad(attended, inputs, gradient if is_expanded else gradient.contiguous()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    query, key, value = (part.detach() for part in states(1))
    assert attend((query, key, value), has_rotary=False).grad_fn is None


def test_a_processor_without_instructions_for_bf16_computes_the_same(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", __file__, "-k", "any_size or written_out"]
    assert subprocess.run(command, env=environment).returncode == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("place", [0, 1], ids=["query", "key"])
def test_what_is_not_finite_is_not_hidden(place: int, value: float) -> None:
    inputs = states(7)
    with torch.no_grad():
        inputs[0][3, 1, 2] = inputs[1][3, 1, 2] = 1e20
        inputs[place][3, 1, 2] = value
    attended = attend(inputs, has_rotary=False)
    assert not attended[3, 1].isfinite().any()
    assert attended[:, 0].isfinite().all()
    gradients = torch.autograd.grad(attended.float().square().sum(), inputs)
    assert not all(gradient.isfinite().all() for gradient in gradients)


def test_states_that_do_not_fit_the_segments_are_refused() -> None:
    query, key, value = states(8)
    for wrong in (
        (query[1:], key, value),
        (query, key[1:], value),
        (query, key, value[:, 1:]),
        (query.half(), key, value),
    ):
        with pytest.raises(ValueError, match=r"takes bf16 states .* as its segments have them"):
            attend(wrong, has_rotary=False)


def test_gradients_are_taken_once() -> None:
    inputs = states(9)
    attended = attend(inputs, has_rotary=False)
    attended.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have been taken before"):
        attended.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is for machines without a GPU")
def test_auto_takes_it_for_bf16_without_dropout() -> None:
    assert resolve_backend(ModelConfig(), "bf16") == "cpu"
    assert resolve_backend(ModelConfig(), "fp32") == "sdpa"
    assert resolve_backend(ModelConfig(attention_dropout=0.1), "bf16") == "sdpa"
    with pytest.raises(InputError, match="cpu has no attention dropout"):
        resolve_backend(ModelConfig(attention_dropout=0.1, attention_backend="cpu"), "bf16")
    with pytest.raises(InputError, match="cpu needs an even head size, not 5"):
        resolve_backend(ModelConfig(hidden_size=20, num_attention_heads=4, attention_backend="cpu"), "bf16")
    with pytest.raises(InputError, match="cpu runs in bf16 only"):
        resolve_backend(ModelConfig(attention_backend="cpu"), "fp32")
