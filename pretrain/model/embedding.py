"""Token and position embeddings of a packed row, with ESM-2's token dropout."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# ESM-2 was trained with 15 % of residues chosen and 80 % of those masked; the factor stays so whatever the mask rate.
TRAINED_MASK_RATIO = 0.15 * 0.8


def token_dropout_scale(tokens: Tensor, cu_seqlens: Tensor, mask_token: int) -> Tensor:
    """Return ESM-2's factor for each token's embedding (Lin et al. 2023; ``token_dropout`` in fair-esm).

    Mask tokens get 0; every other token gets (1 - 0.12) / (1 - r) with r the share of mask tokens in its sequence,
    ``<cls>`` and ``<eos>`` counted.

    Args:
        tokens: Token ids of the packed row [row_tokens].
        cu_seqlens: Bounds of the segments [num_segments + 1].
        mask_token: Id of the mask token.

    Returns:
        fp32 [row_tokens].
    """
    is_mask = (tokens == mask_token).float()
    before = torch.cat((is_mask.new_zeros(1), is_mask.cumsum(0)))
    bounds = cu_seqlens.long()
    observed = before[bounds].diff() / bounds.diff()
    segment = torch.searchsorted(bounds[1:], torch.arange(tokens.numel(), device=tokens.device), right=True)
    return (1.0 - is_mask) * (1.0 - TRAINED_MASK_RATIO) / (1.0 - observed)[segment].clamp(min=1e-6)


class ProteinEmbedding(MegatronModule):
    """Vocabulary-parallel token embedding, optional learned positions, dropout.

    Args:
        config: Engine configuration.
        padded_vocabulary_size: Rows of the embedding (a multiple of 128 whatever the tensor-parallel size).
        num_positions: Learned positions; 0 for none (rotary models).
        mask_token: Id of the mask token when ESM-2's token dropout is on, else -1.
    """

    def __init__(
        self, config: TransformerConfig, padded_vocabulary_size: int, num_positions: int, mask_token: int
    ) -> None:
        super().__init__(config=config)
        self.mask_token = mask_token
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=padded_vocabulary_size,
            embedding_dim=config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        if num_positions:
            self.position_embeddings = torch.nn.Embedding(num_positions, config.hidden_size)
            # Each rank looks up only its share of the tokens under sequence parallelism: gradients are partial sums.
            self.position_embeddings.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.num_positions = num_positions

    def _share(self, by_token: Tensor) -> Tensor:
        """Return this rank's part of a per-token tensor under sequence parallelism, else all of it."""
        return scatter_to_sequence_parallel_region(by_token) if self.config.sequence_parallel else by_token

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed a packed row.

        Args:
            tokens: Token ids [row_tokens].
            positions: Position of each token in its sequence [row_tokens].
            cu_seqlens: Bounds of the segments [num_segments + 1].

        Returns:
            hidden_sbh [row_tokens (over the tensor-parallel ranks under sequence parallelism), 1, hidden_size].
        """
        embedded = self.word_embeddings(tokens[None, :])  # [1, s, h], or [s / ranks, 1, h] already reduce-scattered
        hidden_sbh = embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()
        if self.mask_token >= 0:
            scale = self._share(token_dropout_scale(tokens, cu_seqlens, self.mask_token))
            hidden_sbh = hidden_sbh * scale[:, None, None].to(hidden_sbh.dtype)
        if self.num_positions:
            hidden_sbh = hidden_sbh + self.position_embeddings(self._share(positions))[:, None, :]
        if self.config.hidden_dropout == 0.0 or not self.training:
            return hidden_sbh
        if self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return torch.nn.functional.dropout(hidden_sbh, self.config.hidden_dropout)
        return torch.nn.functional.dropout(hidden_sbh, self.config.hidden_dropout)
