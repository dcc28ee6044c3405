"""One optimizer step and one validation pass: what megatron-core's schedules are given to run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megaprot.common.masking import MASK_TOKEN
from megaprot.common.packing import PackedBatch, PackedRow, to_tensors
from megaprot.pretrain.optimizer import squared_gradient_norm
from megaprot.pretrain.parallel import Place


@dataclass(frozen=True)
class Tally:
    """Sums over masked positions; add them up over rows and ranks, divide once at the end.

    Attributes:
        loss: Summed cross-entropy in nats over all masked positions.
        count: Masked positions.
        correct: Positions whose most likely token is the true one.
        mask_loss: Summed cross-entropy over positions that show the mask token.
        mask_count: Those positions.
    """

    loss: float = 0.0
    count: float = 0.0
    correct: float = 0.0
    mask_loss: float = 0.0
    mask_count: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Nats a masked position; NaN over none."""
        return self.loss / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return _exponential(self.mean_loss)

    @property
    def accuracy(self) -> float:
        """Share of masked positions predicted right."""
        return self.correct / self.count if self.count else math.nan

    @property
    def mask_perplexity(self) -> float:
        """Perplexity over positions that show the mask token alone: the kept and random ones leak or mislead."""
        return _exponential(self.mask_loss / self.mask_count) if self.mask_count else math.nan


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def most_likely_tokens(logits_mv: Tensor) -> Tensor:
    """Return the id of the highest logit at each position [capacity], over all shares of the vocabulary.

    Args:
        logits_mv: This rank's share of the logits [capacity, vocabulary share].
    """
    best, index = logits_mv.max(dim=-1)
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return index
    group = parallel_state.get_tensor_model_parallel_group()
    first = logits_mv.shape[1] * parallel_state.get_tensor_model_parallel_rank()
    shares = [torch.empty_like(best) for _ in range(size)]
    indices = [torch.empty_like(index) for _ in range(size)]
    dist.all_gather(shares, best, group=group)
    dist.all_gather(indices, index + first, group=group)
    winner = torch.stack(shares).argmax(dim=0, keepdim=True)
    return torch.stack(indices).gather(0, winner)[0]


def _loss(batch: PackedBatch, logits_mv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (summed loss, number of masked positions, tally) of one micro-batch, as the schedules want them."""
    labels, used, masked = batch.labels, batch.masked_kind > 0, batch.masked_kind == MASK_TOKEN
    predicted = most_likely_tokens(logits_mv.detach())  # before the loss, which works in place on the logits
    losses_m = vocab_parallel_cross_entropy(logits_mv.unsqueeze(1), labels.unsqueeze(1)).squeeze(1)
    exact = losses_m.detach().double()
    sums = (exact * used).sum(), used.sum(), ((predicted == labels) & used).sum(), (exact * masked).sum(), masked.sum()
    return (losses_m * used).sum(), used.sum().int(), torch.stack([value.double() for value in sums])


def _forward(device: torch.device, rows: Iterator[PackedRow], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = to_tensors(next(rows), device)
    return model(batch), partial(_loss, batch)


def run_rows(chunks: list[DistributedDataParallel], rows: Sequence[PackedRow], place: Place, train: bool) -> Tensor:
    """Send this rank's rows through the pipeline, with the backward pass if ``train``.

    Returns:
        Tally's five sums over this data-parallel rank's rows, fp64, zeros on all but the last pipeline stage.
    """
    streams = [iter(rows) for _ in chunks]  # each model chunk reads every row
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward, place.device),
        data_iterator=streams if len(chunks) > 1 else streams[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        seq_length=rows[0].tokens.shape[0],
        micro_batch_size=1,
        forward_only=not train,
    )
    total = torch.zeros(5, dtype=torch.float64, device=place.device)
    return total + torch.stack(outputs).sum(dim=0) if outputs else total


def sum_over_world(values: Tensor, place: Place) -> list[float]:
    """Add up ``values`` over all ranks, counting each tensor-parallel group once; the same list everywhere."""
    dist.all_reduce(values)
    return (values / place.tensor_size).tolist()


@dataclass(frozen=True)
class StepResult:
    """What one training step did.

    Attributes:
        tally: Sums over the global batch.
        grad_norm: Global gradient norm before clipping; NaN where the fp16 loss scale overflowed.
        requests: Sum over ranks of what each asked for (see ``accumulate_gradients``), by place in the list.
    """

    tally: Tally
    grad_norm: float
    requests: list[float]


def accumulate_gradients(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    rows: Sequence[PackedRow],
    place: Place,
    requests: Sequence[float] = (),
) -> StepResult:
    """Run forward and backward over the global batch and make gradients ready, without changing a weight.

    All that the host must know of a step travels in one message and is read once, at the end (fp16 aside, where
    megatron-core asks for overflows): before that, the host only hands work to the device.

    Args:
        chunks: This rank's model chunks.
        optimizer: Owner of the gradients.
        rows: This data-parallel rank's rows of the global batch.
        place: Where this process stands.
        requests: Numbers of this rank to be summed over ranks in the same message (stop signals, residues, ...).

    Returns:
        Sums and gradient norm of the whole global batch, the same on every rank.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    is_cuda = place.device.type == "cuda"
    extra = torch.tensor(list(requests), dtype=torch.float64, pin_memory=is_cuda).to(place.device, non_blocking=True)
    sums = run_rows(chunks, rows, place, train=True)
    overflow = optimizer.prepare_grads()
    squared_norm = squared_gradient_norm(optimizer, place.data_size).unsqueeze(0)
    values = torch.cat((sums, place.tensor_size * squared_norm, place.tensor_size * extra))
    total = sum_over_world(values, place)
    return StepResult(Tally(*total[:5]), math.nan if overflow else math.sqrt(total[5]), total[6:])


def apply_gradients(optimizer: MegatronOptimizer, grad_norm: float, clip_grad: float) -> None:
    """Clip gradients to the global norm ``clip_grad`` and update the weights."""
    parameters = optimizer.get_parameters()
    if parameters and clip_grad > 0.0:
        clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


@torch.no_grad()
def evaluate_rows(chunks: list[DistributedDataParallel], rows: Sequence[PackedRow], place: Place) -> Tally:
    """Return the tally over ``rows`` of all data-parallel ranks, without dropout and gradients; equal on every rank."""
    for chunk in chunks:
        chunk.eval()
    sums = run_rows(chunks, rows, place, train=False)
    for chunk in chunks:
        chunk.train()
    return Tally(*sum_over_world(sums, place))
