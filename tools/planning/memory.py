"""What a layout holds on its fullest GPU, by part: weights, gradients, optimizer, activations, working memory.

Counted from the tensors that ProteinBert on megatron-core really keeps, after the manner of Korthikanti et al. 2022;
docs/planning.md writes the formulae out, and the tests compare them with measured tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.validation import row_shape_of
from megaprot.tools.planning.chunks import Chunk, chunks_of_ranks, padded_rows, rank_parameters
from megaprot.tools.planning.schedule import peak_in_flight

FLOAT_BYTES = 4
_INDEX_BYTES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, by part.

    Attributes:
        weights: Parameters in the training precision.
        gradients: fp32 gradient buffers.
        optimizer: Moments, and fp32 master weights under half precision; this rank's shard of them.
        activations: What forward passes in flight keep for their backward passes, and the buffers of messages.
        working: Passing tensors of the backward pass, and under recomputation the layer that is computed again.
        reserved: CUDA context, communication buffers and fragmentation; 0 on CPUs.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    reserved: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.model_state + self.activations + self.working + self.reserved

    @property
    def model_state(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Sizes:
    """The numbers that the formulae of one run share.

    Attributes:
        tokens: Tokens of a row, s.
        hidden: Hidden size, h.
        wide: Feed-forward size, f.
        heads: Attention heads.
        tensor: Tensor-parallel size, t.
        shared: Ranks the residual stream is split over: t under sequence parallelism, else 1.
        element: Bytes of a weight or activation.
        copies: Extra copies of the attention output: 1 for ``sdpa``, which puts sequences together, else 0.
        dropout_masks: Bytes that dropout keeps an element of the residual stream.
    """

    tokens: int
    hidden: int
    wide: int
    heads: int
    tensor: int
    shared: int
    element: int
    copies: int
    dropout_masks: int

    @property
    def stream(self) -> float:
        """Bytes of the residual stream on this rank."""
        return self.tokens * self.hidden * self.element / self.shared

    @property
    def split(self) -> float:
        """Bytes of s x h elements split over the tensor-parallel ranks."""
        return self.tokens * self.hidden * self.element / self.tensor

    @property
    def split_wide(self) -> float:
        """Bytes of s x f elements split over the tensor-parallel ranks."""
        return self.tokens * self.wide * self.element / self.tensor


def sizes_of(config: PretrainConfig, backend: str) -> Sizes:
    """Return the sizes of a run whose attention kernel is ``backend`` (``sdpa``, ``varlen`` or ``te``)."""
    model, parallel = config.model, config.parallel
    return Sizes(
        tokens=config.data.row_tokens,
        hidden=model.hidden_size,
        wide=model.feed_forward_size,
        heads=model.num_attention_heads,
        tensor=parallel.tensor,
        shared=parallel.tensor if parallel.sequence else 1,
        element=FLOAT_BYTES if config.train.precision == "fp32" else 2,
        copies=int(backend == "sdpa"),
        dropout_masks=int(model.hidden_dropout > 0),
    )


def layer_activations(sizes: Sizes, recompute: str, going_on: float = 1.0) -> float:
    """Return the bytes one layer keeps of one row.

    Without recomputation: input and output of both LayerNorms (4 streams), the joint projection of query, key and value
    (3), rotated query and key (2), attention's output (1, one more where it is put together from sequences), the
    feed-forward layer before and after its activation (2 of f), and in fp32 each row's two pairs of LayerNorm
    statistics and attention's log sums. ``selective`` drops the rotated query and key, a copy of the output and the log
    sums; ``full`` keeps the layer's input.

    Args:
        sizes: The run's.
        recompute: What is computed again.
        going_on: Share of the tokens that attend and go on through the layer: in the last one, those asked for.
    """
    statistics = 2 * (1 + going_on) * FLOAT_BYTES * sizes.tokens / sizes.shared
    dropout = 2 * going_on * sizes.dropout_masks * sizes.stream / sizes.element
    outside = 2 * (1 + going_on) * sizes.stream + (3 + going_on) * sizes.split + 2 * going_on * sizes.split_wide
    if recompute == "full":
        return sizes.stream
    if recompute == "selective":
        return outside + statistics + dropout
    log_sums = going_on * FLOAT_BYTES * sizes.tokens * sizes.heads / sizes.tensor
    return outside + statistics + dropout + (1 + (1 + sizes.copies) * going_on) * sizes.split + log_sums


def head_activations(sizes: Sizes, capacity: int, rows: int) -> float:
    """Return the bytes the head keeps of one row: five states and fp32 probabilities at each masked position."""
    states = 5 * capacity * sizes.hidden * sizes.element / sizes.shared
    return states + capacity * (rows // sizes.tensor * FLOAT_BYTES + 3 * _INDEX_BYTES)


def chunk_activations(chunk: Chunk, config: PretrainConfig, sizes: Sizes, rows: int) -> float:
    """Return the bytes one forward pass of a chunk keeps, its output included."""
    recompute = config.train.recompute
    kept = (chunk.num_layers - chunk.predicts) * layer_activations(sizes, recompute)
    if config.model.position_embedding == "rotary":
        kept += 2 * FLOAT_BYTES * sizes.tokens * sizes.hidden / sizes.heads
    if chunk.embeds:
        kept += 2 * _INDEX_BYTES * sizes.tokens + sizes.dropout_masks * sizes.stream / sizes.element
    if not chunk.predicts:
        return kept + sizes.stream
    capacity = row_shape_of(config.data, config.parallel.tensor, config.train.fp8).masked_capacity
    return kept + layer_activations(sizes, recompute, capacity / sizes.tokens) + head_activations(sizes, capacity, rows)


def message_buffers(rank: int, pipeline: int, interleaved: bool, sizes: Sizes) -> float:
    """Return the bytes of messages: a stream from each pipeline neighbour, the gathered row of sequence parallelism."""
    neighbours = (rank > 0) + (rank < pipeline - 1 or (interleaved and rank > 0))
    gathered = sizes.shared if sizes.shared > 1 else 0
    return (neighbours + gathered) * sizes.stream


def working_memory(sizes: Sizes, recompute: str, going_on: float = 1.0) -> float:
    """Return the bytes that pass through one layer's backward pass beside what was kept.

    A stream of gradients, the gradient of the widest tensor and one weight's gradient before it is added to its fp32
    buffer; under sequence parallelism the gradient of the gathered row. A layer computed again is held whole meanwhile,
    but for its input, which was kept. ``going_on`` as in ``layer_activations``.
    """
    passing = sizes.stream + going_on * sizes.split_wide + sizes.hidden * sizes.wide // sizes.tensor * sizes.element
    if sizes.shared > 1:
        passing += sizes.stream * sizes.shared
    if recompute == "full":
        passing += layer_activations(sizes, "none", going_on) - sizes.stream
    return passing


def memory_by_rank(config: PretrainConfig, data_size: int, vocabulary_size: int, backend: str) -> list[Memory]:
    """Return the memory of one tensor-parallel rank of each pipeline stage, in order; nothing reserved.

    Args:
        config: The run; its layout must be valid.
        data_size: Data-parallel copies.
        vocabulary_size: Tokens of the vocabulary.
        backend: Attention kernel: ``sdpa``, ``varlen`` or ``te``.
    """
    parallel, sizes = config.parallel, sizes_of(config, backend)
    rows = padded_rows(vocabulary_size)
    num_micro_batches = config.train.global_batch_rows // data_size
    recompute = config.train.recompute
    capacity = row_shape_of(config.data, parallel.tensor, config.train.fp8).masked_capacity
    working, share = working_memory(sizes, recompute), capacity / sizes.tokens
    # When the backward pass of the last layer begins, the head's tensors are gone; when that of the one before begins,
    # those of the last layer, too.
    in_last = working_memory(sizes, recompute, share) - head_activations(sizes, capacity, rows)
    before_last = working - head_activations(sizes, capacity, rows) - layer_activations(sizes, recompute, share)
    shards = data_size if parallel.distributed_optimizer else 1
    state_bytes = (2 if config.train.precision == "fp32" else 3) * FLOAT_BYTES / shards
    found = []
    for rank, (chunks, count) in enumerate(
        zip(chunks_of_ranks(config), rank_parameters(config, vocabulary_size), strict=True)
    ):
        kept = [chunk_activations(chunk, config, sizes, rows) for chunk in chunks]
        in_flight = peak_in_flight(rank, parallel.pipeline, num_micro_batches, kept)
        last = chunks[-1]
        has_more = last.num_layers > 1 or len(chunks) > 1
        on_top = working if not last.predicts else max(in_last, before_last if has_more else 0.0)
        found.append(
            Memory(
                weights=float(count * sizes.element),
                gradients=float(count * FLOAT_BYTES),
                optimizer=count * state_bytes,
                activations=in_flight + message_buffers(rank, parallel.pipeline, len(chunks) > 1, sizes),
                working=max(0.0, on_top),
            )
        )
    return found


def fullest(ranks: list[Memory]) -> Memory:
    """Return the memory of the rank that holds most."""
    return max(ranks, key=lambda memory: memory.total)
