"""A Hugging Face encoder over many sequences at once, without padding where its class allows it.

Sequences stand one after another in one row of tokens; attention stays within each, positions begin anew in each. The
module is transformers' own, with its parameters under their own names, so that it trains, saves and takes adapters as
any other; what differs is reached through transformers' attention interface and hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.packed_attention import segments_of


class Encoder(nn.Module):
    """The encoder of a masked-language model, and its head if it has been loaded.

    Attributes:
        model: transformers' model: ``...ForMaskedLM``, or the encoder alone.
        vocabulary: Letters and boundary tokens of its tokenizer.
        longest: Most residues of a sequence; 0 for any number.
        is_padding_free: Whether sequences stand in one row; else they are padded to the longest of the batch.
        first_position: Position of a sequence's first token.
    """

    def __init__(
        self, model: Any, vocabulary: Vocabulary, longest: int, is_padding_free: bool, first_position: int
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.longest = longest
        self.is_padding_free = is_padding_free
        self.first_position = first_position

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.hidden_size)

    def row(self, sequences: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Return sequences as one row on the model's device, and the tokens of each.

        Args:
            sequences: Residue ids [num_residues] of each, of any integer type; boundary tokens are put around them.
        """
        begin = torch.tensor([self.vocabulary.begin])
        end = torch.tensor([self.vocabulary.end] if self.vocabulary.end >= 0 else [], dtype=torch.long)
        parts = [part for residues in sequences for part in (begin, residues.long(), end)]
        lengths = [len(residues) + self.vocabulary.num_boundary_tokens for residues in sequences]
        return torch.cat(parts).to(self.device, non_blocking=True), lengths

    def forward(self, tokens: Tensor, lengths: Sequence[int], layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Return hidden states [row_tokens, hidden_size] after each of ``layers``.

        Args:
            tokens: Ids of all sequences, one after another, boundary tokens included [row_tokens].
            lengths: Tokens of each sequence; they add up to ``row_tokens``.
            layers: 0 is what enters the first layer, n what leaves layer n, negative ones count from the end; -1 is
                the model's last hidden state, final LayerNorm included.
        """
        encoder = self.model.base_model
        options: dict[str, Any] = {"output_hidden_states": True} if set(layers) != {-1} else {}
        if self.is_padding_free:
            positions = torch.cat([torch.arange(length) for length in lengths]) + self.first_position
            segments = segments_of(lengths, tokens.device)
            found = encoder(
                input_ids=tokens.unsqueeze(0),
                position_ids=positions.to(tokens.device).unsqueeze(0),
                segments=segments,
                **options,
            )
            return [_states(found, layer).squeeze(0) for layer in layers]
        batch = nn.utils.rnn.pad_sequence(tokens.split(list(lengths)), True, self.vocabulary.pad)
        ends = torch.tensor(lengths, device=tokens.device)[:, None]
        is_token = torch.arange(batch.shape[1], device=tokens.device)[None, :] < ends
        found = encoder(input_ids=batch, attention_mask=is_token.long(), **options)
        return [_states(found, layer)[is_token] for layer in layers]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the masked-language model's logits [num_tokens, vocabulary] of last hidden states."""
        head = self.model.lm_head if hasattr(self.model, "lm_head") else self.model.cls
        logits: Tensor = head(hidden)
        return logits


def _states(found: Any, layer: int) -> Tensor:
    """Return one layer's hidden states of a transformers output."""
    states: Tensor = found.last_hidden_state if layer == -1 else found.hidden_states[layer]
    return states
