"""ProteinBert: ESM-2's encoder (Lin et al. 2023) built from megatron-core's parallel layers, on packed rows."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megaprot.common.packing import PackedBatch
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model.attention import PackedAttention, PackedSequences, pack_sequences, rotary_table
from megaprot.pretrain.model.embedding import ProteinEmbedding
from megaprot.pretrain.model.feed_forward import FeedForward
from megaprot.pretrain.model.last_layer import LastLayer
from megaprot.pretrain.model.layer_norm import LayerNorm
from megaprot.pretrain.model.linears import linear_layers
from megaprot.pretrain.model.lm_head import LMHead

VOCABULARY_MULTIPLE = 128


def padded_vocabulary_size(vocabulary: Vocabulary) -> int:
    """Return the rows of the embedding: a multiple of 128 that does not depend on the tensor-parallel size."""
    return -(-vocabulary.size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def layer_specification(attention_backend: str, has_fp8: bool, is_last: bool) -> ModuleSpec:
    """Return megatron-core's recipe for one pre-LN layer with packed attention (Megatron's ``ModuleSpec`` system)."""
    column, row = linear_layers(has_fp8)
    return ModuleSpec(
        module=LastLayer if is_last else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=partial(PackedAttention, attention_backend),
                    linear_proj=row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=FeedForward,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class ProteinBert(LanguageModule):
    """One pipeline chunk of the encoder; the first also embeds, the last also predicts.

    Args:
        config: Engine configuration (shape, layout, precision).
        model: Megaprot's model section (positions, token dropout).
        vocabulary: Tokens of the corpus.
        max_sequence_length: Rows of the learned position embedding.
        attention_backend: Kernel, resolved: ``sdpa``, ``cpu``, ``varlen`` or ``te``.
        pre_process: This chunk embeds tokens.
        post_process: This chunk ends with the head.
        vp_stage: Number of this chunk on its pipeline rank; None without an interleaved pipeline.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        vocabulary: Vocabulary,
        max_sequence_length: int,
        attention_backend: str,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = True
        self.vocabulary_size = vocabulary.size
        self.rotary = model.position_embedding == "rotary"
        rows = padded_vocabulary_size(vocabulary)
        if pre_process:
            self.embedding = ProteinEmbedding(
                config,
                rows,
                num_positions=0 if self.rotary else max_sequence_length,
                mask_token=vocabulary.mask if model.token_dropout else -1,
            )
        num_layers = get_num_layers_to_build(config, vp_stage)
        layers = [
            layer_specification(attention_backend, config.fp8 is not None, post_process and number == num_layers - 1)
            for number in range(num_layers)
        ]
        self.encoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=LayerNorm),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.lm_head = LMHead(config)
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                rows,
                config=config,
                init_method=config.init_method,
                bias=True,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states the previous pipeline stage sent (called by megatron-core's schedules)."""
        self.encoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def _packed(self, batch: PackedBatch) -> PackedSequences:
        rotation = rotary_table(batch.positions, self.config.kv_channels) if self.rotary else None
        packed = pack_sequences(batch.cu_seqlens, batch.segment_lengths, rotation)
        if self.post_process:
            packed.asked = packed.attended_from(batch.masked_positions, batch.masked_cu_seqlens, batch.masked_lengths)
        return packed

    def forward(self, batch: PackedBatch) -> Tensor:
        """Encode one packed row and, on the last stage, predict at the masked positions.

        Args:
            batch: The row after masking. Its number of masked positions, the capacity, is a multiple of the
                tensor-parallel size under sequence parallelism. The first stage alone reads the tokens.

        Returns:
            Hidden states [row_tokens, 1, hidden_size] for the next stage, or on the last stage fp32 logits
            [capacity, this rank's part of the padded vocabulary], padded entries -inf.
        """
        embedded = self.embedding(batch.tokens, batch.positions, batch.cu_seqlens) if self.pre_process else None
        hidden_sbh = self.encoder(
            hidden_states=embedded,
            attention_mask=None,
            packed_seq_params=self._packed(batch),
        )
        if not self.post_process:
            return hidden_sbh
        return self._predict(hidden_sbh)

    def _predict(self, hidden_mbh: Tensor) -> Tensor:
        """Return logits [capacity, vocabulary share] of the final hidden states at the masked positions."""
        logits, _ = self.output_layer(self.lm_head(hidden_mbh), weight=self.shared_embedding_or_output_weight())
        logits_mv = logits.squeeze(1).float()
        first = self.output_layer.output_size_per_partition * get_tensor_model_parallel_rank()
        beyond = torch.arange(first, first + logits_mv.shape[1], device=logits_mv.device) >= self.vocabulary_size
        return logits_mv.masked_fill(beyond, float("-inf"))
