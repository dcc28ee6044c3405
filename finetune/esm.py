"""What transformers' ESM needs to run padding-free and fast: token dropout by sequence, and one fused GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.esm.modeling_esm import EsmIntermediate

MASKED_IN_TRAINING = 0.15 * 0.8
"""Share of mask tokens ESM-2 was trained with, which its embeddings are scaled to (Lin et al. 2023)."""


class FusedIntermediate(EsmIntermediate):
    """ESM's feed-forward expansion with torch's erf GELU: one pass over memory in place of six, equal to 1e-6."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the activated expansion [..., intermediate_size] of hidden states."""
        return functional.gelu(self.dense(hidden_states))


def prepare(model: Any) -> None:
    """Adapt an ``EsmModel`` in place; parameters keep their names and values."""
    for layer in model.encoder.layer:
        layer.intermediate.__class__ = FusedIntermediate
    if model.config.token_dropout:
        model.embeddings.register_forward_pre_hook(_drop_by_sequence, with_kwargs=True)


def _drop_by_sequence(
    embeddings: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply token dropout to each sequence of a row; transformers' own takes the row as one sequence."""
    tokens, positions = options["input_ids"], options["position_ids"]
    words = embeddings.word_embeddings(tokens)
    scaled = (words * token_scale(tokens[0], positions[0], embeddings.mask_token_id)).to(words.dtype)
    return arguments, options | {"input_ids": None, "inputs_embeds": scaled}


def token_scale(tokens: Tensor, positions: Tensor, mask: int) -> Tensor:
    """Return ESM-2's scale of each token's embedding [row_tokens, 1]: 0 for masks, else by its sequence's masks.

    Args:
        tokens: Ids [row_tokens].
        positions: Position of each token; a sequence begins wherever the first one's returns.
        mask: Id of the mask token.
    """
    sequence = (positions == positions[0]).cumsum(0) - 1
    is_mask = (tokens == mask).float()
    counts = torch.zeros(2, len(tokens), device=tokens.device)
    counts = counts.index_add(1, sequence, torch.stack((is_mask, torch.ones_like(is_mask))))
    masked_share = (counts[0] / counts[1].clamp(min=1))[sequence]
    return ((1 - is_mask) * (1 - MASKED_IN_TRAINING) / (1 - masked_share)).unsqueeze(-1)
