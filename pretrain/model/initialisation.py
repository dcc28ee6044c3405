"""Initial weights as a pure function of (seed, global parameter name), so that every layout starts the same model.

megatron-core draws weights in each rank's own order, so two layouts of one model start apart. Here each parameter's
whole tensor is drawn from a generator seeded by its name, and a rank keeps its slice. The names and slices are the ones
distributed checkpoints use.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule

# One key a layer in checkpoints; megatron-core would otherwise stack all layers into one tensor.
SHARDING_METADATA = {"non_homogeneous_layers": True}


def parameter_seed(seed: int, name: str) -> int:
    """Return the 63-bit generator seed of the parameter called ``name`` in a run seeded with ``seed``."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def initial_tensor(name: str, shape: tuple[int, ...], seed: int, std: float, num_layers: int) -> torch.Tensor:
    """Return the whole fp32 start value of one parameter.

    LayerNorm weights are 1 and biases 0; every matrix is normal with ``std``, the two output projections of a layer
    with ``std / sqrt(2 * num_layers)`` (Megatron-LM, after GPT-2).
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.ones(shape)
    if name.endswith(("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")):
        std = std / math.sqrt(2.0 * num_layers)
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(module: MegatronModule, seed: int, std: float, num_layers: int) -> None:
    """Fill every parameter of one pipeline chunk with its start value.

    Args:
        module: The chunk, on its device and in its data type.
        seed: Seed of the run.
        std: Standard deviation of matrices.
        num_layers: Layers of the whole model.
    """
    filled = 0
    for sharded in module.sharded_state_dict(metadata=dict(SHARDING_METADATA)).values():
        if not isinstance(sharded, ShardedTensor) or not sharded.data.is_floating_point():
            continue
        whole = initial_tensor(sharded.key, tuple(sharded.global_shape), seed, std, num_layers)
        window = tuple(
            slice(start, start + size) for start, size in zip(sharded.global_offset, sharded.local_shape, strict=True)
        )
        sharded.data.copy_(whole[window])
        filled += sharded.data.numel()
    expected = sum(parameter.numel() for parameter in module.parameters())
    assert filled == expected, f"initialised {filled} of {expected} weights"
