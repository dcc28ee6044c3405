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
from megaprot.finetune.batch import Batch, PairBatch
from megaprot.finetune.packed_attention import OnAttention


class Encoder(nn.Module):
    """The encoder of a masked-language model, and its head if it has been loaded.

    Attributes:
        model: transformers' model: ``...ForMaskedLM``, or the encoder alone.
        vocabulary: Letters and boundary tokens of its tokenizer.
        longest: Most residues of a sequence; 0 for any number.
        is_padding_free: Whether sequences stand in one row; else they are padded to the longest of the batch.
        first_position: Position of a sequence's first token.
        second_type: Token type of a pair's second protein; the first has 0.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        longest: int,
        is_padding_free: bool,
        first_position: int,
        second_type: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.longest = longest
        self.is_padding_free = is_padding_free
        self.first_position = first_position
        self.second_type = second_type

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
    def num_heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.model.config.num_attention_heads)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.hidden_size)

    def forward(
        self, batch: Batch, layers: Sequence[int] = (-1,), on_attention: OnAttention | None = None
    ) -> list[Tensor]:
        """Return hidden states [row_tokens, hidden_size] after each of ``layers``.

        Args:
            batch: Sequences, on the model's device.
            layers: 0 is what enters the first layer, n what leaves layer n, negative ones count from the end; -1 is
                the model's last hidden state, final LayerNorm included.
            on_attention: Told each layer's attention maps as they are made, boundary tokens included: (layer from 0,
                number of the first sequence, probabilities [num_sequences, heads, length, length]) for each run of
                sequences of one length. Padding-free models keep no map longer than it does.
        """
        options: dict[str, Any] = {"output_hidden_states": True} if set(layers) != {-1} else {}
        types = batch.is_second.long() * self.second_type if isinstance(batch, PairBatch) and self.second_type else None
        if self.is_padding_free:
            if types is not None:
                options["token_type_ids"] = types.unsqueeze(0)
            found = self.model.base_model(
                input_ids=batch.tokens.unsqueeze(0),
                position_ids=(batch.positions + self.first_position).unsqueeze(0),
                batch=batch,
                on_attention=on_attention,
                **options,
            )
            return [_states(found, layer).squeeze(0) for layer in layers]
        padded = nn.utils.rnn.pad_sequence(list(batch.tokens.split(batch.lengths)), True, self.vocabulary.pad)
        is_token = torch.zeros_like(padded, dtype=torch.bool)
        is_token[batch.sequence, batch.positions] = True
        if types is not None:
            options["token_type_ids"] = nn.utils.rnn.pad_sequence(list(types.split(batch.lengths)), True)
        if on_attention is not None:
            options["output_attentions"] = True
        found = self.model.base_model(input_ids=padded, attention_mask=is_token.long(), **options)
        if on_attention is not None:
            for layer, maps in enumerate(found.attentions):
                for first, count, length in batch.runs:
                    on_attention(layer, first, maps[first : first + count, :, :length, :length])
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
