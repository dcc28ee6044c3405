"""Weights by their global names, whatever the layout: loading a rank's share, and putting the shares together again."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megaprot.pretrain.model.initialisation import SHARDING_METADATA

# (name, offset of each axis, shape of the whole, this rank's part)
Share = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def _sharded(module: Any) -> list[ShardedTensor]:
    described = module.sharded_state_dict(metadata=dict(SHARDING_METADATA)).values()
    return [part for part in described if isinstance(part, ShardedTensor)]


def _window(offset: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def load_global(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Fill every parameter of one model chunk with its window of the whole tensor of its name."""
    for part in _sharded(module):
        whole = weights[part.key]
        assert tuple(whole.shape) == tuple(part.global_shape), part.key
        part.data.copy_(whole[_window(part.global_offset, part.local_shape)])


def shares_of(module: Any) -> list[Share]:
    """This rank's part of every parameter of one model chunk, copied to the CPU."""
    return [
        (part.key, tuple(part.global_offset), tuple(part.global_shape), part.data.detach().cpu().clone())
        for part in _sharded(module)
    ]


def gather_global(modules: Iterable[Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Whole tensors by name, from the shares of all ranks, and the names whose replicas are not equal to the bit."""
    mine = [share for module in modules for share in shares_of(module)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, Tensor] = {}
    unequal = set()
    for name, offset, shape, part in (share for shares in everyone for share in shares):
        target = whole.setdefault(name, torch.full(shape, float("nan"), dtype=part.dtype))
        window = target[_window(offset, part.shape)]
        if not bool(window.isnan().all()) and not torch.equal(window, part):
            unequal.add(name)
        window.copy_(part)
    assert not any(bool(tensor.isnan().any()) for tensor in whole.values()), "a part of a weight is on no rank"
    return whole, sorted(unequal)
