"""From the run's configuration to megatron-core's: engine settings, wrapped model chunks."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.model.attention import resolve_backend
from megaprot.pretrain.model.initialisation import initialise
from megaprot.pretrain.model.protein_bert import ProteinBert
from megaprot.pretrain.parallel import Place

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS = {
    "gelu_erf": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def layers_per_chunk(num_layers: int, num_chunks: int, layout: list[int]) -> list[int]:
    """Return the layers of each pipeline chunk in order: ``layout`` itself, or an even spread if it is empty."""
    if layout:
        return layout
    share, remainder = divmod(num_layers, num_chunks)
    return [share + (chunk < remainder) for chunk in range(num_chunks)]


def _pipeline_layout(config: PretrainConfig) -> list[list[str]] | None:
    """Return the pipeline layout in megatron-core's words, None without a pipeline."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return None
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    counts = layers_per_chunk(config.model.num_layers, num_chunks, parallel.pipeline_layout)
    layout = [["decoder"] * count for count in counts]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def check_fp8(config: PretrainConfig) -> None:
    """Raise InputError where ``train.fp8`` is asked for and cannot be had."""
    if not config.train.fp8:
        return
    if config.train.precision != "bf16":
        raise InputError("train.fp8 multiplies matrices of a bf16 model; set train.precision bf16.")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise InputError("train.fp8 needs a GPU of compute capability 9.0 (H100) or newer; switch it off here.")
    if importlib.util.find_spec("transformer_engine") is None:
        raise InputError("train.fp8 needs the package transformer-engine (pip install megaprot[gpu]).")
    tensor = config.parallel.tensor
    row_tokens, model = config.data.row_tokens, config.model
    for name, size in (("data.row_tokens", row_tokens), ("model.hidden_size", model.hidden_size)):
        if size % (32 * tensor):
            raise InputError(f"train.fp8 needs a multiple of {32 * tensor} for {name}, not {size}.")


def transformer_config(config: PretrainConfig) -> TransformerConfig:
    """Return megatron-core's configuration of the encoder for this run.

    Fusions that would change what is computed stay off: ``bias_activation_fusion`` silently turns erf GELU into tanh.
    Losses are summed per token and divided by the global number of masked positions, so the gradient does not depend
    on how rows are dealt to ranks and micro-batches.
    """
    model, parallel, train = config.model, config.parallel, config.train
    dtype = PRECISIONS[train.precision]
    interleaved = parallel.virtual_pipeline > 1
    # Both recipes scale by present values alone: no history has to be saved for a run to go on as it was.
    is_blackwell = train.fp8 and torch.cuda.get_device_capability() >= (10, 0)
    recompute = {"none": None, "selective": "selective", "full": "full"}[train.recompute]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.feed_forward_size,
        activation_func=ACTIVATIONS[model.activation],
        layernorm_epsilon=model.layer_norm_epsilon,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        attention_backend=AttnBackend.auto,
        add_bias_linear=True,
        # initialise() fills every weight by its name; megatron-core still has to mark the sharded ones, so only the
        # drawing is left out.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        use_cpu_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        fp8=("e4m3" if is_blackwell else "hybrid") if train.fp8 else None,
        fp8_recipe="mxfp8" if is_blackwell else "tensorwise",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(config),
        sequence_parallel=parallel.sequence,
        # Batched messages pair wrongly when both pipeline neighbours are the same rank (two interleaved stages).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        bias_activation_fusion=False,
        bias_dropout_fusion=torch.cuda.is_available(),  # compiled by torch
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def finalize_gradients(
    chunks: list[DistributedDataParallel],
    num_masked: torch.Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Reduce gradients as megatron-core does, then divide them by the global number of masked positions.

    megatron-core's own division asks the device whether the number is 0, and the host waits for the answer.

    Args:
        chunks: This rank's model chunks.
        num_masked: Masked positions of this data-parallel rank, on the last pipeline stage.
        pg_collection: The groups, for megatron-core.
        force_all_reduce: For megatron-core.
    """
    finalize_model_grads(chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    if num_masked is None:
        return
    stages = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(num_masked, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=stages)
    dist.all_reduce(num_masked, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_masked.clamp(min=1))


def build_model(
    config: PretrainConfig, engine: TransformerConfig, vocabulary: Vocabulary, place: Place
) -> list[DistributedDataParallel]:
    """Return this rank's model chunks, initialised and wrapped for data parallelism.

    Args:
        config: The run.
        engine: What ``transformer_config`` made of it; the gradient hooks are set on it.
        vocabulary: Tokens of the corpus.
        place: Where this process stands.
    """
    virtual = config.parallel.virtual_pipeline
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_communication,
        overlap_param_gather=config.parallel.overlap_communication and config.parallel.distributed_optimizer,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        average_in_collective=False,
    )
    backend = resolve_backend(config.model, config.train.precision)
    chunks = []
    for chunk in range(virtual):
        stage = chunk if virtual > 1 else None
        bert = ProteinBert(
            engine,
            config.model,
            vocabulary,
            config.data.max_sequence_length,
            backend,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        bert = bert.to(device=place.device, dtype=engine.params_dtype)
        initialise(bert, config.run.seed, config.model.initial_std, config.model.num_layers)
        chunks.append(DistributedDataParallel(engine, ddp_config, bert, disable_bucketing=chunk > 0))
    engine.finalize_model_grads_func = finalize_gradients
    if config.parallel.overlap_communication:
        engine.no_sync_func = [wrapped.no_sync for wrapped in chunks] if virtual > 1 else chunks[0].no_sync
    return chunks
