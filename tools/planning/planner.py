"""Memory and time of layouts on given GPUs, those that fit in order of speed, and the nearest to one that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megaprot.common.errors import InputError
from megaprot.pretrain.config import ModelConfig, PretrainConfig
from megaprot.pretrain.engine import layers_per_chunk
from megaprot.pretrain.validation import row_shape_of
from megaprot.tools.planning.chunks import rank_parameters
from megaprot.tools.planning.gpus import GIB, Gpu
from megaprot.tools.planning.layouts import check_valid, valid_layouts
from megaprot.tools.planning.memory import Memory, fullest, layer_activations, memory_by_rank, sizes_of
from megaprot.tools.planning.search import RECOMPUTE, SearchConfig
from megaprot.tools.planning.step_time import StepTime, Work, model_flops_utilisation, step_time

CONTEXT_BYTES = 2.0 * GIB
FRAGMENTATION = 0.05
CLOSE = 0.03
PARTS = ("weights", "gradients", "optimizer", "activations", "working", "reserved")
_NAMES = {"working": "the backward pass's working memory", "reserved": "what CUDA and NCCL take"}
DAY_SECONDS = 86_400.0
# Bytes that ProteinBert's unfused elementwise kernels move for each of a row's s x h half-precision elements, forward
# and backward, counted from the code: rotation of query and key in fp32, separate additions of biases and residuals.
_ROTARY_TRAFFIC, _ADDITION_TRAFFIC = 200.0, 60.0


@dataclass(frozen=True)
class Estimate:
    """What one layout is predicted to need.

    Attributes:
        config: The run with this layout.
        gpu: The GPUs.
        data_size: Data-parallel copies.
        memory: The fullest rank's.
        time: A step's.
        work: The run as the time model sees it.
    """

    config: PretrainConfig
    gpu: Gpu
    data_size: int
    memory: Memory
    time: StepTime
    work: Work

    @property
    def too_large(self) -> str:
        """The part that no longer fits when the parts are added up in order; empty where all fit."""
        held = 0.0
        for part in PARTS:
            held += getattr(self.memory, part)
            if held > self.gpu.memory_bytes:
                return _NAMES.get(part, part)
        return ""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step over all GPUs."""
        return self.config.train.global_batch_rows * self.config.data.row_tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all GPUs."""
        return self.batch_tokens / self.time.total

    @property
    def mfu(self) -> float:
        """Arithmetic of the step over the data sheet's."""
        return model_flops_utilisation(self.work, self.gpu, self.time.total)

    def days(self, num_tokens: float) -> float:
        """Return the days that ``num_tokens`` take."""
        return num_tokens / self.tokens_per_second / DAY_SECONDS


def planned_backend(model: ModelConfig, precision: str) -> str:
    """Return the attention kernel a GPU run would take, without looking at a GPU.

    Raises:
        InputError: The one that is asked for is for the CPU.
    """
    if model.attention_backend == "cpu":
        raise InputError("model.attention_backend cpu is for the CPU; plan GPUs with auto, varlen, te or sdpa.")
    if model.attention_backend != "auto":
        return model.attention_backend
    head_size = model.hidden_size // model.num_attention_heads
    flash = precision != "fp32" and head_size % 8 == 0 and head_size <= 256 and model.attention_dropout == 0
    return "varlen" if flash else "sdpa"


def work_of(config: PretrainConfig, data_size: int, vocabulary_size: int, attended: float, backend: str) -> Work:
    """Return a run as the time model sees it.

    Args:
        config: The run; its layout must be valid.
        data_size: Data-parallel copies.
        vocabulary_size: Tokens of the vocabulary.
        attended: Tokens that a token attends to, on average over tokens.
        backend: Attention kernel.
    """
    parallel, model = config.parallel, config.model
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    layers = layers_per_chunk(model.num_layers, num_chunks, parallel.pipeline_layout)
    sizes = sizes_of(config, backend)
    capacity = row_shape_of(config.data, parallel.tensor, config.train.fp8).masked_capacity
    an_element = _ADDITION_TRAFFIC + (_ROTARY_TRAFFIC if model.position_embedding == "rotary" else 0.0)
    return Work(
        num_layers=tuple(sum(layers[rank :: parallel.pipeline]) for rank in range(parallel.pipeline)),
        hidden=model.hidden_size,
        wide=model.feed_forward_size,
        tokens=config.data.row_tokens,
        sequence_length=attended,
        # The head's square matrix and the decoder, as one product of the same arithmetic.
        head_columns=vocabulary_size + model.hidden_size,
        head_tokens=float(capacity),
        last_tokens=float(capacity),
        num_micro_batches=config.train.global_batch_rows // data_size,
        tensor=parallel.tensor,
        virtual_pipeline=parallel.virtual_pipeline,
        data=data_size,
        sequence=parallel.sequence,
        distributed_optimizer=parallel.distributed_optimizer,
        overlap=parallel.overlap_communication,
        recompute=config.train.recompute,
        layer_bytes=layer_activations(sizes, "none"),
        last_bytes=layer_activations(sizes, "none", capacity / sizes.tokens),
        stage_parameters=tuple(rank_parameters(config, vocabulary_size)),
        element=sizes.element,
        unfused_bytes=an_element * sizes.split / sizes.element,
    )


def estimate(config: PretrainConfig, data_size: int, gpu: Gpu, vocabulary_size: int, attended: float) -> Estimate:
    """Return memory and time of a valid layout; the arguments are those of ``work_of``."""
    backend = planned_backend(config.model, config.train.precision)
    memory = fullest(memory_by_rank(config, data_size, vocabulary_size, backend))
    memory = replace(memory, reserved=CONTEXT_BYTES + FRAGMENTATION * memory.total)
    work = work_of(config, data_size, vocabulary_size, attended, backend)
    return Estimate(config, gpu, data_size, memory, step_time(work, gpu), work)


def estimates(
    config: PretrainConfig, num_gpus: int, gpu: Gpu, vocabulary_size: int, attended: float, search: SearchConfig
) -> list[Estimate]:
    """Return every valid layout's estimate, fastest first; those that do not fit are among them.

    Raises:
        InputError: No layout is valid, with the reason.
    """
    found = [
        estimate(run, data_size, gpu, vocabulary_size, attended)
        for run, data_size in valid_layouts(config, num_gpus, int(gpu.gpus_per_node), search)
    ]
    if not found:
        check_valid(config, num_gpus)  # says what is wrong where even the plain run is refused
        raise InputError(
            f"no layout of {num_gpus} GPUs divides a batch of {config.train.global_batch_rows} rows and "
            f"{config.model.num_layers} layers; change --gpus, train.global_batch_rows or the search."
        )
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.memory.total))


def fitting(found: Sequence[Estimate]) -> list[Estimate]:
    """Return those that fit; raises InputError naming the part that does not where none does."""
    fit = [one for one in found if not one.too_large]
    if fit:
        return fit
    least = min(found, key=lambda one: one.memory.total)
    raise InputError(
        f"nothing fits: even {layout_words(least)} needs {memory_words(least)}: no room is left for "
        f"{least.too_large}; take more GPUs, larger ones or a smaller model."
    )


def simplest_first(fit: Sequence[Estimate], config: PretrainConfig) -> list[Estimate]:
    """Return layouts that fit, fastest first, but for the simplest of those nearly as fast, which comes before all.

    The model cannot tell layouts apart that differ by less than ``CLOSE``. Simple is: few ranks and chunks a model, no
    recomputation, rows as ``config`` has them.
    """

    def complexity(one: Estimate) -> tuple[float, ...]:
        parallel, again = one.config.parallel, RECOMPUTE.index(one.config.train.recompute)
        other_rows = one.config.data.row_tokens != config.data.row_tokens
        return parallel.tensor * parallel.pipeline, parallel.virtual_pipeline, again, other_rows, one.memory.total

    best = min((one for one in fit if one.tokens_per_second >= (1 - CLOSE) * fit[0].tokens_per_second), key=complexity)
    return [best, *(one for one in fit if one is not best)]


def layout_words(one: Estimate) -> str:
    """Return a layout as flags of ``megaprot pretrain``, those with the default's value left out."""
    return " ".join(layout_flags(one.config)) or "the plain layout"


def layout_flags(config: PretrainConfig) -> list[str]:
    """Return the flags that ask for a layout, one ``--key value`` each."""
    parallel, train = config.parallel, config.train
    flags = [f"--parallel.tensor {parallel.tensor}"] if parallel.tensor > 1 else []
    for name in ("pipeline", "virtual_pipeline"):
        if getattr(parallel, name) > 1:
            flags.append(f"--parallel.{name} {getattr(parallel, name)}")
    for name in ("sequence", "distributed_optimizer"):
        if getattr(parallel, name):
            flags.append(f"--parallel.{name} true")
    flags += [f"--data.row_tokens {config.data.row_tokens}", f"--train.global_batch_rows {train.global_batch_rows}"]
    return [*flags, f"--train.recompute {train.recompute}"]


def memory_words(one: Estimate) -> str:
    """Return the memory of a layout in words, by part."""
    parts = ", ".join(f"{part} {getattr(one.memory, part) / GIB:.1f}" for part in PARTS)
    return f"{one.memory.total / GIB:.1f} GiB a GPU of {one.gpu.memory_gb:.1f} ({parts})"


def _distance(one: PretrainConfig, other: PretrainConfig) -> float:
    """Return how much two layouts differ: doublings of sizes, and less for what is only switched."""
    sizes = [(getattr(one.parallel, key), getattr(other.parallel, key)) for key in ("tensor", "pipeline")]
    sizes += [(one.data.row_tokens, other.data.row_tokens)]
    chunks = one.parallel.virtual_pipeline, other.parallel.virtual_pipeline
    switched = one.parallel.sequence != other.parallel.sequence
    sharded = one.parallel.distributed_optimizer != other.parallel.distributed_optimizer
    again = one.train.recompute != other.train.recompute
    moved = sum(abs(math.log2(first / second)) for first, second in sizes)
    return moved + 0.5 * abs(math.log2(chunks[0] / chunks[1])) + 0.25 * (switched + sharded) + 0.5 * again


def nearest_fitting(config: PretrainConfig, found: Sequence[Estimate]) -> Estimate:
    """Return the layout that fits and differs least from ``config``'s, the fastest of several alike."""
    return min(fitting(found), key=lambda one: (_distance(config, one.config), -one.tokens_per_second))


def estimate_of(
    config: PretrainConfig, num_gpus: int, gpu: Gpu, vocabulary_size: int = 33, attended: float = 512.0
) -> Estimate:
    """Return the estimate of a run's own layout on ``num_gpus``; raises InputError where pretraining refuses it."""
    return estimate(config, check_valid(config, num_gpus), gpu, vocabulary_size, attended)


def refuse_unless_fits(
    config: PretrainConfig, num_gpus: int, gpu: Gpu, vocabulary_size: int = 33, attended: float = 512.0
) -> Estimate:
    """Return the estimate of a layout, for whoever starts runs to ask before a job is queued.

    Args:
        config: The run; its layout must be valid for ``num_gpus``.
        num_gpus: Processes, one a GPU.
        gpu: The GPUs, such as ``GPUS["h100"]``.
        vocabulary_size: Tokens of the vocabulary.
        attended: Tokens that a token attends to, on average; memory does not depend on it.

    Raises:
        InputError: The layout is refused, or cannot fit; names the part that does not and the nearest that does.
    """
    asked = estimate_of(config, num_gpus, gpu, vocabulary_size, attended)
    if not asked.too_large:
        return asked
    problem = f"the layout does not fit: it needs {memory_words(asked)}: no room is left for {asked.too_large}"
    try:
        nearest = nearest_fitting(config, estimates(config, num_gpus, gpu, vocabulary_size, attended, SearchConfig()))
    except InputError as error:
        raise InputError(f"{problem}; {error}") from error
    raise InputError(f"{problem}; the nearest that fits: {layout_words(nearest)}.")
