"""Matrix-product attention against rotation and softmax(Q K^T / sqrt(d)) V written out in double precision."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model import cpu_attention
from megaprot.pretrain.model.attention import resolve_backend, rotary_table
from megaprot.pretrain.model.cpu_attention import SegmentAttention

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


@pytest.mark.parametrize("longest_kept", [512, 20, 0])
@pytest.mark.parametrize("score_bytes", [1 << 21, 4_000])
@pytest.mark.parametrize("has_rotary", [True, False], ids=["rotary", "learned"])
@pytest.mark.parametrize("queries", [EVERY_TOKEN, SOME_TOKENS], ids=["every token", "some tokens"])
def test_outputs_and_gradients_are_those_of_attention_written_out(
    queries: tuple[int, ...],
    has_rotary: bool,
    score_bytes: int,
    longest_kept: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_attention, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(cpu_attention, "LONGEST_KEPT", longest_kept)
    inputs = states(1, queries)
    attended = attend(inputs, has_rotary, queries)
    expected = naive(*inputs, has_rotary, queries)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is for machines without a GPU")
def test_auto_takes_it_for_bf16_without_dropout() -> None:
    assert resolve_backend(ModelConfig(), "bf16") == "matmul"
    assert resolve_backend(ModelConfig(), "fp32") == "sdpa"
    assert resolve_backend(ModelConfig(attention_dropout=0.1), "bf16") == "sdpa"
    with pytest.raises(InputError, match="matmul has no attention dropout"):
        resolve_backend(ModelConfig(attention_dropout=0.1, attention_backend="matmul"), "bf16")
    with pytest.raises(InputError, match="matmul runs in bf16 only"):
        resolve_backend(ModelConfig(attention_backend="matmul"), "fp32")
