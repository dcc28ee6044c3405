"""The masked-language-model head: dense, GELU (erf), LayerNorm; the tied decoder follows it."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaprot.pretrain.model.layer_norm import LayerNorm


class LMHead(MegatronModule):
    """Transforms hidden states before they meet the tied embedding (BERT's and ESM-2's head).

    The weights are whole on every tensor-parallel rank; under sequence parallelism each rank transforms its share of
    the positions, so the gradients are partial sums and marked as such.

    Args:
        config: Engine configuration.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size)
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_mbh: Tensor) -> Tensor:
        """Transform states [masked positions, 1, hidden_size]; the shape stays."""
        return self.layer_norm(torch.nn.functional.gelu(self.dense(hidden_mbh)))
