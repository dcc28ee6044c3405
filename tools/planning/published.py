"""Published training rates beside what the time model predicts for them: how its shares were fitted, how far it errs.

Rows marked ``fitted`` set the three matrix shares (``gpus.py``), ``HALF_SIZE`` and ``TRAFFIC_FACTOR``; the error to
expect is that of the others. What a source leaves out is assumed here and said in ``docs/planning.md``: micro-batches
of the ESM-2 runs, and width, depth and schedule of Megatron-LM's models, whose parameters and layouts are published.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from megaprot.pretrain.engine import layers_per_chunk
from megaprot.tools.planning.gpus import GPUS, Gpu
from megaprot.tools.planning.step_time import Work, step_time

BIONEMO = "BioNeMo Framework 2.7, ESM-2 model page"
RECIPES = "BioNeMo recipes, esm2_native_te benchmarks"
MEGATRON = "Megatron-LM README, H100 model table"
SCALING = "Megatron-LM README, strong scaling of 175B"

_ESM2 = {"650M": (33, 1280), "3B": (36, 2560), "15B": (48, 5120)}
_GPT_WIDTH = {
    "1.7B": 2304,
    "7.1B": 4096,
    "16B": 6144,
    "32B": 6144,
    "70B": 8192,
    "119B": 10240,
    "177B": 12288,
    "314B": 16384,
    "462B": 18432,
}
_GPT_VOCABULARY, _GPT_LENGTH, _GPT_CHUNKS = 131_072, 4096, 4


@dataclass(frozen=True)
class PublishedRun:
    """A rate somebody published, and the run as the time model sees it.

    Attributes:
        name: Model, GPUs and layout.
        source: Where it was published.
        gpu: Name in ``GPUS``.
        work: The run.
        tflops: Published TFLOP/s a GPU.
        counted: Operations that the source counts in a step, over all GPUs.
        fitted: The row set the model's shares.
    """

    name: str
    source: str
    gpu: str
    work: Work
    tflops: float
    counted: float
    fitted: bool

    def predicted(self, gpu: Gpu) -> float:
        """Return the TFLOP/s a GPU that the time model gives, counted as the source counts."""
        return self.counted / step_time(self.work, gpu).total / self.work.num_gpus / 1e12

    def error(self, gpu: Gpu) -> float:
        """Return the relative error of the prediction."""
        return self.predicted(gpu) / self.tflops - 1.0


def _work(
    layers: int,
    hidden: int,
    tokens: int,
    length: float,
    head: tuple[int, float],
    data: int,
    tensor: int = 1,
    pipeline: int = 1,
    num_micro_batches: int = 1,
    tensor_overlap: bool = False,
) -> Work:
    """Return the work of a bf16 run with fused kernels, sequence parallelism, overlap and a distributed optimizer."""
    split = tokens * hidden * 2 / tensor
    per_stage = tuple(layers_per_chunk(layers, pipeline, []))
    columns, head_tokens = head
    return Work(
        num_layers=per_stage,
        hidden=hidden,
        wide=4 * hidden,
        tokens=tokens,
        sequence_length=length,
        head_columns=columns,
        head_tokens=head_tokens,
        last_tokens=tokens,
        num_micro_batches=num_micro_batches,
        tensor=tensor,
        virtual_pipeline=_GPT_CHUNKS if pipeline > 1 else 1,
        data=data,
        sequence=tensor > 1,
        distributed_optimizer=True,
        overlap=True,
        recompute="none",
        layer_bytes=(4 + 6 + 8) * split,
        last_bytes=(4 + 6 + 8) * split,
        tensor_overlap=tensor_overlap,
        stage_parameters=tuple((12 * count * hidden * hidden + columns * hidden) // tensor for count in per_stage),
    )


def _esm2(
    size: str, gpu: str, num_gpus: int, tokens: int, rate: float, source: str, fitted: bool, length: float = 1024.0
) -> PublishedRun:
    """Return an ESM-2 row; ``rate`` is tokens a second and GPU. 15B under BioNeMo 2 was split over 2 (assumed)."""
    layers, hidden = _ESM2[size]
    tensor = 2 if size == "15B" and source == BIONEMO else 1
    work = _work(layers, hidden, tokens, length, (128, 0.15 * tokens), num_gpus // tensor, tensor)
    a_token = work.flops / tokens / work.data
    name = f"ESM-2 {size}, {num_gpus} x {gpu}"
    return PublishedRun(name, source, gpu, work, rate * a_token / 1e12, work.flops, fitted)


def _esm2_by_flops(size: str, gpu: str, num_gpus: int, tokens: int, tflops: float, fitted: bool) -> PublishedRun:
    """Return a row of the recipes that is published in TFLOP/s a GPU."""
    row = _esm2(size, gpu, num_gpus, tokens, 1.0, RECIPES, fitted)
    return PublishedRun(row.name, row.source, gpu, row.work, tflops, row.counted, fitted)


def _gpt(
    size: str, tensor: int, pipeline: int, data: int, num_micro_batches: int, tflops: float, source: str, fitted: bool
) -> PublishedRun:
    """Return a GPT row of Megatron-LM on H100; attention is counted in full but computed for the causal half."""
    hidden = _GPT_WIDTH[size]
    parameters = float(size[:-1]) * 1e9
    layers = round((parameters - _GPT_VOCABULARY * hidden) / (12 * hidden * hidden))
    head = (_GPT_VOCABULARY, float(_GPT_LENGTH))
    sizes = (data, tensor, pipeline, num_micro_batches, True)
    work = _work(layers, hidden, _GPT_LENGTH, _GPT_LENGTH / 2, head, *sizes)
    counted = _work(layers, hidden, _GPT_LENGTH, _GPT_LENGTH, head, *sizes).flops
    name = f"GPT {size}, {work.num_gpus} x h100, TP{tensor} PP{pipeline}"
    return PublishedRun(name, source, "h100", work, tflops, counted, fitted)


def published_runs() -> list[PublishedRun]:
    """Return all rows."""
    fitted, held = True, False
    return [
        _esm2("650M", "a100-80", 16, 16 * 1024, 42_667, BIONEMO, fitted),
        _esm2("3B", "a100-80", 16, 16 * 1024, 11_000, BIONEMO, held),
        _esm2("15B", "a100-80", 64, 4 * 1024, 1_940, BIONEMO, held),
        _esm2("650M", "a100-80", 1, 46 * 1024, 41_800, BIONEMO, held),
        _esm2("3B", "a100-80", 256, 16 * 1024, 10_703, BIONEMO, held),
        _esm2("650M", "h100", 16, 32 * 1024, 95_871, BIONEMO, fitted),
        _esm2("3B", "h100", 16, 16 * 1024, 26_801, BIONEMO, fitted),
        _esm2("15B", "h100", 64, 4 * 1024, 4_159, BIONEMO, held),
        _esm2("15B", "h100", 16, 16 * 1024, 5_230, RECIPES, held, 450.0),
        _esm2("15B", "b200", 16, 16 * 1024, 10_800, RECIPES, held, 450.0),
        _esm2("15B", "h200", 8, 16 * 1024, 5_900, RECIPES, held, 450.0),
        _esm2_by_flops("650M", "b300", 8, 16 * 1024, 815.0, held),
        _esm2_by_flops("3B", "b300", 8, 16 * 1024, 1_045.0, fitted),
        _esm2_by_flops("15B", "b300", 8, 16 * 1024, 1_106.0, held),
        _gpt("1.7B", 1, 1, 48, 8, 408.8, MEGATRON, fitted),
        _gpt("7.1B", 2, 1, 48, 8, 465.9, MEGATRON, held),
        _gpt("16B", 4, 1, 48, 8, 489.1, MEGATRON, held),
        _gpt("32B", 8, 1, 48, 8, 459.6, MEGATRON, fitted),
        _gpt("70B", 8, 2, 48, 8, 419.7, MEGATRON, held),
        _gpt("119B", 8, 4, 48, 16, 420.5, MEGATRON, held),
        _gpt("177B", 8, 6, 48, 24, 432.8, MEGATRON, held),
        _gpt("314B", 8, 8, 48, 32, 474.4, MEGATRON, fitted),
        _gpt("462B", 8, 16, 48, 64, 459.9, MEGATRON, held),
        _gpt("177B", 8, 6, 2, 576, 0.47 * 989, SCALING, held),
        _gpt("177B", 8, 6, 96, 12, 0.42 * 989, SCALING, held),
    ]


def median_error(runs: Iterable[PublishedRun]) -> float:
    """Return the median of the absolute relative errors."""
    return statistics.median(abs(run.error(GPUS[run.gpu])) for run in runs)
