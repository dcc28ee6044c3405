"""Gradient caching against plain autograd over everything at once."""

import torch
from torch import Tensor, nn

from megaprot.finetune.gradient_caching import Block, cached_step

CPU = torch.device("cpu")


class Tower(nn.Module):
    """Makes vectors of parts, with dropout, and a matrix of scores of joined vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(inputs, tuple):
            return inputs[0] @ self.weight @ inputs[1].t()
        vectors: Tensor = self.layers(inputs)
        return vectors


def tower() -> Tower:
    torch.manual_seed(4)
    return Tower().double()


def parts_of(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator, dtype=torch.float64) for size in sizes]


def join(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(vectors[:3]), vectors[3]


def loss_of(scores: Tensor) -> Tensor:
    """A loss that no split by rows or columns gives."""
    return torch.logsumexp(scores.flatten(), 0) + scores.diagonal().sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def taken(model: Tower, learns: list[bool], scale: float = 1.0, is_blank: bool = False) -> tuple[Tensor, list[bool]]:
    """Loss of a cached step, and what each backward was told."""
    told: list[bool] = []

    def backward(loss: Tensor, is_last: bool) -> None:
        told.append(is_last)
        (loss * scale).backward()

    share = 0.0 if is_blank else 1.0
    block = Block(parts_of([3, 2, 4, 5]), learns, join, [], is_blank)
    return cached_step(model, block, lambda scores: loss_of(scores) * share, backward, CPU), told


def test_the_gradient_is_that_of_one_big_batch_dropout_included() -> None:
    torch.manual_seed(9)
    whole = tower()
    torch.manual_seed(9)
    vectors = [whole(part) for part in parts_of([3, 2, 4, 5])]
    expected = loss_of(whole(join(vectors)))
    expected.backward()
    cached = tower()
    torch.manual_seed(9)
    loss, told = taken(cached, [True] * 4)
    torch.testing.assert_close(loss, expected.detach())
    for found, wanted in zip(gradients(cached), gradients(whole), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)
    assert told == [False, False, False, False, True]


def test_a_loss_scale_counts_once() -> None:
    plain, scaled = tower().eval(), tower().eval()
    taken(plain, [True] * 4)
    taken(scaled, [True] * 4, scale=1024.0)
    for found, wanted in zip(gradients(scaled), gradients(plain), strict=True):
        torch.testing.assert_close(found / 1024, wanted)


def test_parts_that_do_not_learn_are_read_once_and_get_no_gradient() -> None:
    model = tower().eval()
    calls: list[int] = []
    model.layers.register_forward_hook(lambda *_: calls.append(1))
    _, told = taken(model, [False, False, False, False])
    assert len(calls) == 4
    assert told == [True]
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["weight"]


def test_a_blank_step_calls_all_and_moves_nothing() -> None:
    model = tower().eval()
    loss, told = taken(model, [True] * 4, is_blank=True)
    assert float(loss) == 0.0
    assert len(told) == 5
    assert all(not gradient.any() for gradient in gradients(model))
