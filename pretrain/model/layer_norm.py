"""LayerNorm for megatron-core's module specs that also works under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` with the constructor megatron-core's specs call.

    Under sequence parallelism each tensor-parallel rank sees only its share of the tokens, so the gradients of weight
    and bias are partial sums: both are marked ``sequence_parallel``, so that megatron-core adds them up over the ranks.

    Args:
        config: Engine configuration; only ``sequence_parallel`` is read.
        hidden_size: Width of the normalised dimension.
        eps: Added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
