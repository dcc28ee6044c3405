"""Matrix-product attention against softmax(Q K^T / sqrt(d)) V written out, in double precision, and its gradients."""

import math

import pytest
import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model import cpu_attention
from megaprot.pretrain.model.attention import resolve_backend
from megaprot.pretrain.model.cpu_attention import SegmentAttention

SEGMENTS = (1, 7, 40, 13, 2)
NUM_HEADS, HEAD_SIZE = 3, 8


def states(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as views of one tensor, as the fused projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(sum(SEGMENTS), NUM_HEADS, 3 * HEAD_SIZE, generator=generator).to(dtype)
    query, key, value = (part.detach().requires_grad_() for part in mixed.chunk(3, dim=-1))
    return query, key, value


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend head by head and token by token over the tokens of the same segment, in double precision."""
    segment = torch.repeat_interleave(torch.arange(len(SEGMENTS)), torch.tensor(SEGMENTS))
    rows = []
    for token in range(query.shape[0]):
        same = segment == segment[token]
        heads = []
        for head in range(NUM_HEADS):
            scores = (key[same, head].double() * query[token, head].double()).sum(-1) / math.sqrt(HEAD_SIZE)
            weights = scores.exp() / scores.exp().sum()
            heads.append((weights[:, None] * value[same, head].double()).sum(0))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("longest_kept", [512, 20, 0])
@pytest.mark.parametrize("score_bytes", [1 << 21, 4_000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_outputs_and_gradients_are_those_of_attention_written_out(
    dtype: torch.dtype, tolerance: float, score_bytes: int, longest_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(cpu_attention, "LONGEST_KEPT", longest_kept)
    inputs = states(1, dtype)
    attended = SegmentAttention.apply(*inputs, SEGMENTS)
    expected = naive(*inputs)
    wanted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = (attended, *torch.autograd.grad(attended, inputs, wanted))
    references = (expected, *torch.autograd.grad(expected, inputs, wanted.double()))
    for mine, reference in zip(found, references, strict=True):
        assert mine.dtype == dtype
        assert float((mine.detach().double() - reference.detach()).norm() / reference.detach().norm()) < tolerance


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    query, key, value = (part.detach() for part in states(1, torch.float32))
    assert SegmentAttention.apply(query, key, value, SEGMENTS).grad_fn is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is for machines without a GPU")
def test_auto_takes_it_for_bf16_without_dropout() -> None:
    assert resolve_backend(ModelConfig(), "bf16") == "matmul"
    assert resolve_backend(ModelConfig(), "fp32") == "sdpa"
    assert resolve_backend(ModelConfig(attention_dropout=0.1), "bf16") == "sdpa"
    with pytest.raises(InputError, match="matmul has no attention dropout"):
        resolve_backend(ModelConfig(attention_dropout=0.1, attention_backend="matmul"), "bf16")
