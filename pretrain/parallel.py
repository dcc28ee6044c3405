"""Processes, groups and devices: from ``torchrun``'s environment to megatron-core's process groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megaprot.common.errors import LostPeersError
from megaprot.common.world import join_world, named_losses
from megaprot.pretrain import cpu_backend
from megaprot.pretrain.config import ParallelConfig
from megaprot.pretrain.model.initialisation import parameter_seed


@dataclass(frozen=True)
class Place:
    """Where this process stands in the layout.

    Attributes:
        rank: Rank in the world.
        world_size: Processes in the world.
        data_rank: Rank among data-parallel copies.
        data_size: Data-parallel copies.
        pipeline_rank: Pipeline stage.
        tensor_rank: Rank inside the tensor-parallel group.
        tensor_size: Tensor-parallel size.
        device: Device of weights and batches.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    pipeline_rank: int
    tensor_rank: int
    tensor_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes the run's files."""
        return self.rank == 0


def start_processes(timeout_minutes: float) -> torch.device:
    """Join the world that ``torchrun`` describes (a world of one without it) and return this process's device.

    NCCL on CUDA devices, gloo without. Installs the CPU backend where there is no CUDA device.

    Args:
        timeout_minutes: Longest wait in one collective.
    """
    if not torch.cuda.is_available():
        cpu_backend.install()
    return join_world(timeout_minutes)


def lay_out(parallel: ParallelConfig, device: torch.device) -> Place:
    """Build megatron-core's process groups for this layout and return this process's place.

    May be called again with another layout after ``parallel_state.destroy_model_parallel()``.
    """
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, virtual)
    model_parallel_cuda_manual_seed(0)  # creates the tracker; seed_dropout sets the states of each step
    return Place(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        device=device,
    )


def seed_dropout(seed: int, step: int, place: Place) -> None:
    """Set all random states as a pure function of (seed, step, pipeline rank, data rank).

    Nothing random is carried from step to step, so a resumed run draws the same dropout without saving any state.
    Tensor-parallel ranks share the default state and differ in the tracker's, as megatron-core expects.
    """
    mixed = parameter_seed(seed, f"dropout {step} {place.pipeline_rank} {place.data_rank}")
    mixed %= 2**31 - 10_000  # megatron-core adds small offsets
    torch.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed, force_reset_rng=True)


@contextmanager
def processes(parallel: ParallelConfig, timeout_minutes: float) -> Iterator[Place]:
    """Join the world, lay it out and give this process's place; leave the groups at the end.

    After an error NCCL's groups are left to the end of the process: taking them down would wait for the other ranks,
    which may be waiting for this one, and its message would not be seen.

    Raises:
        LostPeersError: In place of what a collective raises when another process is gone.
    """
    try:
        with named_losses():
            yield lay_out(parallel, start_processes(timeout_minutes))
    except BaseException as error:
        if not (isinstance(error, LostPeersError) or torch.cuda.is_available()):
            stop_processes()
        raise
    stop_processes()


def stop_processes() -> None:
    """Leave the process groups, so that the process ends without warnings."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
