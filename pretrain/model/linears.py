"""Which tensor-parallel linear layers the encoder is built of: megatron-core's own, or Transformer Engine's for FP8."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def linear_layers(has_fp8: bool) -> tuple[Any, Any]:
    """Return the classes of column- and row-parallel layers; the parameters have the same names in both families."""
    if not has_fp8:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
