"""Every layout of a run on some number of GPUs that pretraining accepts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from megaprot.common.errors import InputError
from megaprot.common.packing_plan import check_row_shape
from megaprot.pretrain.config import ParallelConfig, PretrainConfig
from megaprot.pretrain.validation import check_batch, check_layout, check_model, check_numbers
from megaprot.tools.planning.search import RECOMPUTE, SearchConfig

_BOUNDARY_TOKENS = 2


def check_valid(config: PretrainConfig, num_gpus: int) -> int:
    """Return the data-parallel size of a layout on ``num_gpus``; raises InputError where pretraining would refuse it.

    Overlapped communication needs CUDA where the run is, not where it is planned, so that key is not looked at.
    """
    check_numbers(config)
    check_model(config.model, config.parallel)
    anywhere = replace(config, parallel=replace(config.parallel, overlap_communication=False))
    data_size = check_layout(anywhere, num_gpus)
    check_batch(config.train, config.parallel, data_size)
    check_row_shape(config.data.row_tokens, config.data.max_sequence_length, _BOUNDARY_TOKENS)
    return data_size


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _with_row_tokens(config: PretrainConfig, row_tokens: int) -> PretrainConfig | None:
    """Return the run with rows of another length and the same tokens in a batch; None where they do not divide."""
    if row_tokens == config.data.row_tokens:
        return config
    batch_tokens = config.data.row_tokens * config.train.global_batch_rows
    if batch_tokens % row_tokens or config.train.ramp_up_start_rows:
        return None
    return replace(
        config,
        data=replace(config.data, row_tokens=row_tokens),
        train=replace(config.train, global_batch_rows=batch_tokens // row_tokens),
    )


def _splits(
    config: PretrainConfig, num_gpus: int, gpus_per_node: int, search: SearchConfig
) -> Iterator[ParallelConfig]:
    """Give tensor x pipeline x chunks x sequence parallelism; tensor parallelism stays inside a machine."""
    sizes = _divisors(num_gpus)
    tensors = search.tensor or [size for size in sizes if size <= gpus_per_node]
    stages = search.pipeline or [size for size in sizes if size <= config.model.num_layers]
    for tensor, pipeline in product(tensors, stages):
        if num_gpus % (tensor * pipeline):
            continue
        most = config.model.num_layers // pipeline if pipeline > 1 else 1
        data_size = num_gpus // (tensor * pipeline)
        for virtual, sequence in product(search.virtual_pipeline or _divisors(most), (False, True)):
            yield replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                pipeline_layout=[],
                sequence=sequence,
                distributed_optimizer=config.parallel.distributed_optimizer or data_size > 1,
            )


def valid_layouts(
    config: PretrainConfig, num_gpus: int, gpus_per_node: int, search: SearchConfig
) -> Iterator[tuple[PretrainConfig, int]]:
    """Give every layout that pretraining accepts, with its data-parallel size.

    The optimizer is sharded wherever there are data-parallel copies: that costs nothing and saves memory.

    Args:
        config: The run; model, batch and overlap are kept.
        num_gpus: GPUs of the run.
        gpus_per_node: GPUs of a machine.
        search: What is tried.
    """
    rows = search.row_tokens or [int(config.data.row_tokens * factor) for factor in (0.25, 0.5, 1, 2, 4)]
    recompute = search.recompute or list(RECOMPUTE)
    for parallel, row_tokens in product(list(_splits(config, num_gpus, gpus_per_node, search)), rows):
        run = _with_row_tokens(config, row_tokens)
        if run is None:
            continue
        run = replace(run, parallel=parallel)
        try:
            data_size = check_valid(run, num_gpus)
        except InputError:
            continue
        for again in recompute:
            yield replace(run, train=replace(run.train, recompute=again)), data_size  # type: ignore[arg-type]
