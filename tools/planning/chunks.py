"""How a layout cuts the model: the layers, ends and parameters of each pipeline rank."""

from __future__ import annotations

from dataclasses import dataclass

from megaprot.pretrain.config import ModelConfig, PretrainConfig
from megaprot.pretrain.engine import layers_per_chunk
from megaprot.pretrain.model.protein_bert import VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class Chunk:
    """A stretch of layers that one pipeline rank runs without a break.

    Attributes:
        num_layers: Transformer layers.
        embeds: It begins with the embedding.
        predicts: It ends with the head.
    """

    num_layers: int
    embeds: bool
    predicts: bool


def chunks_of_ranks(config: PretrainConfig) -> list[list[Chunk]]:
    """Return the chunks of each pipeline rank; chunk ``c`` of the model belongs to rank ``c mod pipeline``."""
    parallel = config.parallel
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    layers = layers_per_chunk(config.model.num_layers, num_chunks, parallel.pipeline_layout)
    chunks = [Chunk(count, number == 0, number == num_chunks - 1) for number, count in enumerate(layers)]
    return [chunks[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]


def padded_rows(vocabulary_size: int) -> int:
    """Return the rows of the embedding for a vocabulary of this size."""
    return -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def layer_parameters(model: ModelConfig, tensor: int) -> int:
    """Return the parameters of one layer on one tensor-parallel rank.

    Query, key, value and feed-forward matrices are split; LayerNorms and the biases of the two output projections are
    whole on every rank (Shoeybi et al. 2019).
    """
    hidden, wide = model.hidden_size, model.feed_forward_size
    split = 4 * hidden * hidden + 2 * hidden * wide + 3 * hidden + wide
    return split // tensor + 6 * hidden


def chunk_parameters(chunk: Chunk, model: ModelConfig, tensor: int, rows: int, num_positions: int) -> int:
    """Return the parameters of a chunk on one tensor-parallel rank.

    Args:
        chunk: The stretch of layers.
        model: Shape.
        tensor: Tensor-parallel size.
        rows: Rows of the padded embedding.
        num_positions: Rows of the position embedding; 0 with rotary positions.
    """
    hidden = model.hidden_size
    count = chunk.num_layers * layer_parameters(model, tensor)
    if chunk.embeds:
        count += rows * hidden // tensor + num_positions * hidden
    if chunk.predicts:
        count += 2 * hidden  # final LayerNorm
        count += hidden * hidden + 3 * hidden + rows // tensor  # the head, and the decoder's bias
        if not chunk.embeds:
            count += rows * hidden // tensor  # its own copy of the tied embedding
    return count


def rank_parameters(config: PretrainConfig, vocabulary_size: int) -> list[int]:
    """Return the parameters one tensor-parallel rank of each pipeline stage holds."""
    model, rows = config.model, padded_rows(vocabulary_size)
    num_positions = config.data.max_sequence_length if model.position_embedding == "learned" else 0
    return [
        sum(chunk_parameters(chunk, model, config.parallel.tensor, rows, num_positions) for chunk in chunks)
        for chunks in chunks_of_ranks(config)
    ]
