"""Gradient caching (Gao et al. 2021): one loss over many micro-batches, in the memory of one.

Where a loss compares everything in a step with everything else, its micro-batches cannot be taken one by one. First all
are read without gradients, which leaves a vector for each item; the loss and its gradient at the vectors are taken of
all together; then each micro-batch is read again, and the gradient at its vectors goes on into the weights. So a step
of n proteins and m terms costs n + m passes of the towers (twice forward, once backward), and its gradient is that of
one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """What a step reads on this process, and how it comes together.

    Attributes:
        parts: Micro-batches on the CPU; the model makes vectors [num_items, size] of each.
        learns: Whether gradients go into what makes the vectors of each part; where not, it is read once.
        join: From the vectors of all parts to what the model makes the outputs of.
        members: The examples that the outputs are of.
        is_blank: Whether they only keep this process in step with the others.
    """

    parts: Sequence[Any]
    learns: Sequence[bool]
    join: Callable[[list[Tensor]], Any]
    members: Sequence[Any]
    is_blank: bool


class Backward(Protocol):
    """What takes a loss's gradient; ``is_last`` says that the optimizer may move after it."""

    def __call__(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of ``loss`` to the weights."""


def cached_step(
    model: Callable[[Any], Any],
    block: Block,
    loss_of: Callable[[Any], Tensor],
    backward: Backward,
    device: torch.device,
) -> Tensor:
    """Add the gradient of a block's loss to the weights; return the loss.

    Args:
        model: Makes vectors of parts, and outputs of joined vectors.
        block: The step.
        loss_of: From outputs to the loss.
        backward: Called once for the joined loss, once for each part that learns.
        device: Where the model is.
    """
    states, vectors = [], []
    with torch.no_grad():
        for part in block.parts:
            states.append(_RandomState(device))
            vectors.append(model(part.to(device)))
    leaves = [one.detach().requires_grad_(learns) for one, learns in zip(vectors, block.learns, strict=True)]
    again = [place for place, learns in enumerate(block.learns) if learns]
    loss = loss_of(model(block.join(leaves)))
    scales: list[Tensor] = []
    loss.register_hook(lambda gradient: scales.append(gradient.detach()))  # fp16's loss scale, which must count once
    backward(loss, is_last=not again)
    for place in again:
        gradient = leaves[place].grad
        with states[place].restored():  # the same dropout as the vectors' had
            fresh = model(block.parts[place].to(device))
        if gradient is None:  # a blank
            gradient = torch.zeros_like(fresh)
        backward((fresh * (gradient / scales[0])).sum(), is_last=place == again[-1])
    return loss.detach()


class _RandomState:
    """The state of the random generators when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let the generators go on from that state within a block."""
        with torch.random.fork_rng([] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
