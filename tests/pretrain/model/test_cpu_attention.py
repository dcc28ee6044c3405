"""Matrix-product attention against rotation and softmax(Q K^T / sqrt(d)) V written out in double precision."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model import cpu_attention
from megaprot.pretrain.model.attention import resolve_backend, rotary_table
from megaprot.pretrain.model.cpu_attention import SegmentAttention

SEGMENTS = (1, 7, 40, 13, 2)
NUM_HEADS, HEAD_SIZE = 3, 8


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def states(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as views of one tensor, as the fused projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(sum(SEGMENTS), NUM_HEADS, 3 * HEAD_SIZE, generator=generator).bfloat16()
    query, key, value = (part.detach().requires_grad_() for part in mixed.chunk(3, dim=-1))
    return query, key, value


def table() -> tuple[Tensor, Tensor]:
    """Return the rotary table of positions that restart in each segment."""
    return rotary_table(torch.cat([torch.arange(length) for length in SEGMENTS]), HEAD_SIZE)


def rotated(states: Tensor, has_rotary: bool) -> Tensor:
    """Turn channels c and c + HEAD_SIZE / 2, as one complex number, by position * 10000^(-2 c / HEAD_SIZE)."""
    if not has_rotary:
        return states.double()
    positions = torch.cat([torch.arange(length) for length in SEGMENTS]).double()
    half = HEAD_SIZE // 2
    angles = positions[:, None, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(*states.double().split(half, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive(query: Tensor, key: Tensor, value: Tensor, has_rotary: bool) -> Tensor:
    """Attend head by head and token by token over the tokens of the same segment, in double precision."""
    segment = torch.repeat_interleave(torch.arange(len(SEGMENTS)), torch.tensor(SEGMENTS))
    query, key, value = rotated(query, has_rotary), rotated(key, has_rotary), value.double()
    rows = []
    for token in range(query.shape[0]):
        same = segment == segment[token]
        heads = []
        for head in range(NUM_HEADS):
            scores = (key[same, head] * query[token, head]).sum(-1) / math.sqrt(HEAD_SIZE)
            weights = scores.exp() / scores.exp().sum()
            heads.append((weights[:, None] * value[same, head]).sum(0))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("longest_kept", [512, 20, 0])
@pytest.mark.parametrize("score_bytes", [1 << 21, 4_000])
@pytest.mark.parametrize("has_rotary", [True, False], ids=["rotary", "learned"])
def test_outputs_and_gradients_are_those_of_attention_written_out(
    has_rotary: bool, score_bytes: int, longest_kept: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(cpu_attention, "LONGEST_KEPT", longest_kept)
    inputs = states(1)
    attended = SegmentAttention.apply(*inputs, *(table() if has_rotary else (None, None)), SEGMENTS)
    expected = naive(*inputs, has_rotary)
    wanted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = (attended, *torch.autograd.grad(attended, inputs, wanted))
    references = (expected, *torch.autograd.grad(expected, inputs, wanted.double()))
    for mine, reference in zip(found, references, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.detach().double() - reference.detach()).norm() / reference.detach().norm()) < 1e-2


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        inputs = states(4)
        attended = SegmentAttention.apply(*inputs, *table(), SEGMENTS)
        found.append((attended, *torch.autograd.grad(attended.float().square().sum(), inputs)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_gradient_of_any_strides_is_taken() -> None:
    found = []
    for is_expanded in (True, False):
        inputs = states(5)
        attended = SegmentAttention.apply(*inputs, None, None, SEGMENTS)
        gradient = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand(attended.shape)
        found.append(torch.autograd.grad(attended, inputs, gradient if is_expanded else gradient.contiguous()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    query, key, value = (part.detach() for part in states(1))
    assert SegmentAttention.apply(query, key, value, None, None, SEGMENTS).grad_fn is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is for machines without a GPU")
def test_auto_takes_it_for_bf16_without_dropout() -> None:
    assert resolve_backend(ModelConfig(), "bf16") == "matmul"
    assert resolve_backend(ModelConfig(), "fp32") == "sdpa"
    assert resolve_backend(ModelConfig(attention_dropout=0.1), "bf16") == "sdpa"
    with pytest.raises(InputError, match="matmul has no attention dropout"):
        resolve_backend(ModelConfig(attention_dropout=0.1, attention_backend="matmul"), "bf16")
    with pytest.raises(InputError, match="matmul runs in bf16 only"):
        resolve_backend(ModelConfig(attention_backend="matmul"), "fp32")
