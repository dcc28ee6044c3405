"""The encoder's last layer, computed only where a prediction is asked for."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megaprot.pretrain.model.attention import PackedSequences


class LastLayer(TransformerLayer):
    """A layer in which every token is attended to, but only the masked positions attend and go on.

    No later layer looks at the other tokens and no loss is taken on them, so that predictions and gradients are those
    of the whole layer, while six tokens of seven are spared attention, output projection and feed-forward network.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Transform the row's states [row_tokens, 1, hidden_size] to those asked for [capacity, 1, hidden_size].

        Args:
            hidden_states: Under sequence parallelism this rank's share of the row; the result is then its share of
                the positions.
            attention_mask: Not used.
            packed_seq_params: The row, with ``asked``.
            unused: What else megatron-core hands to its layers.
        """
        assert packed_seq_params is not None and packed_seq_params.asked is not None, "the last layer must be asked"
        asked = packed_seq_params.asked
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=None, packed_seq_params=asked
        )
        residual = self._chosen(hidden_states, asked.query_positions)
        with self.bias_dropout_add_exec_handler():  # as in the layers before: one compiled function for all passes
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_mbh = add(attended, residual, self.hidden_dropout)
        return self._forward_mlp(hidden_mbh), None

    def _chosen(self, hidden_sbh: Tensor, positions: Tensor | None) -> Tensor:
        """Return the states at ``positions``, under sequence parallelism an even share of them."""
        if not self.config.sequence_parallel:
            return hidden_sbh[positions]
        # The positions are spread unevenly over the ranks' shares of the row.
        whole = gather_from_sequence_parallel_region(hidden_sbh, tensor_parallel_output_grad=False)
        return scatter_to_sequence_parallel_region(whole[positions])
