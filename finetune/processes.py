"""The processes of a run: one, or those that torchrun started, over NCCL or gloo."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megaprot.common.errors import LostPeersError
from megaprot.common.world import join_world, named_losses


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: Its number.
        world_size: How many there are.
        device: Where its tensors are.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def from_main(self, value: Any) -> Any:
        """Return what rank 0 gave, on every rank."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def sum(self, values: list[float]) -> list[float]:
        """Return sums over the ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def to_main(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, nothing on the others."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.gather_object(value, gathered if self.is_main else None, dst=0)
        return gathered if self.is_main else []

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def processes(timeout_minutes: float) -> Iterator[Place]:
    """Join the world that ``torchrun`` describes (a world of one without it), and leave it at the end.

    After an error NCCL's groups are left to the end of the process: taking them down would wait for the other ranks,
    which may be waiting for this one, and its message would not be seen. So are all groups where a process is lost.

    Args:
        timeout_minutes: Longest wait in one collective.

    Raises:
        LostPeersError: In place of what a collective raises when another process is gone.
    """
    try:
        with named_losses():
            device = join_world(timeout_minutes)
            yield Place(dist.get_rank(), dist.get_world_size(), device)
    except BaseException as error:
        if not (isinstance(error, LostPeersError) or torch.cuda.is_available()):
            _leave()
        raise
    _leave()


def _leave() -> None:
    """Leave the world; DeepSpeed, where it was used, keeps groups of its own and is told to let them go."""
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.cdb is not None:
        comm.destroy_process_group()
        comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()
