"""How long a training step takes: arithmetic, memory traffic, messages and the bubble, from stated formulae.

docs/planning.md writes the formulae out. The shares of data-sheet rates are fitted to published runs, see
``published.py``; nothing here has been measured on the user's machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaprot.tools.planning.gpus import Gpu

# Fitted together with each generation's matrix share; see published.py.
HALF_SIZE = 77.0  # a matrix dimension of this size costs half the rate
TRAFFIC_FACTOR = 6.1  # memory traffic of a layer, forward and backward, over the bytes it keeps
ATTENTION_SHARE = 0.6  # flash attention over matrix products of the same arithmetic (Dao 2023, Shah et al. 2024)
LINK_SHARE = 0.75  # reached by collectives, of the data sheet's bandwidth
TENSOR_SHOWN = 0.25  # of tensor-parallel messages where they are overlapped with matrix products piece by piece
LATENCY_SECONDS = 15e-6  # of one collective
KERNEL_SECONDS = 4.5e-6  # one kernel launch from Python
KERNELS_A_LAYER = 150  # forward and backward, without fusions
OPTIMIZER_TRAFFIC = 34.0  # bytes a parameter: norm, moments, master weight, new weight


@dataclass(frozen=True)
class Work:
    """What the time model must know of a run; any transformer can be described, so published runs can be compared.

    Attributes:
        num_layers: Layers of each pipeline stage.
        hidden: Hidden size.
        wide: Feed-forward size.
        tokens: Tokens of a micro-batch on one data-parallel rank.
        sequence_length: Tokens that a token attends to, on average over tokens.
        head_columns: Columns of the output matrix, and ``head_tokens`` the positions it runs on.
        head_tokens: Positions the head predicts.
        last_tokens: Tokens that attend and go on in the last layer: ProteinBert's are the positions it predicts.
        num_micro_batches: Micro-batches of a step on each rank.
        tensor: Tensor-parallel size.
        virtual_pipeline: Chunks a stage holds.
        data: Data-parallel copies.
        sequence: Sequence parallelism is on.
        distributed_optimizer: Optimizer state is sharded.
        overlap: Gradients are reduced and weights gathered during computation.
        recompute: ``none``, ``selective`` or ``full``.
        layer_bytes: Bytes one layer keeps of a micro-batch on this rank, without recomputation.
        last_bytes: The same of the last layer.
        stage_parameters: Parameters of each stage on this rank.
        element: Bytes of a weight or activation.
        unfused_bytes: Memory traffic of a layer, forward and backward, that fused kernels would not have.
        tensor_overlap: Tensor-parallel messages run beside matrix products (Megatron-LM's ``--tp-comm-overlap``).
    """

    num_layers: tuple[int, ...]
    hidden: int
    wide: int
    tokens: int
    sequence_length: float
    head_columns: int
    head_tokens: float
    last_tokens: float
    num_micro_batches: int
    tensor: int
    virtual_pipeline: int
    data: int
    sequence: bool
    distributed_optimizer: bool
    overlap: bool
    recompute: str
    layer_bytes: float
    last_bytes: float
    stage_parameters: tuple[int, ...]
    element: int = 2
    tensor_overlap: bool = False
    unfused_bytes: float = 0.0

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return len(self.num_layers)

    @property
    def num_gpus(self) -> int:
        """GPUs of the run."""
        return self.tensor * self.pipeline * self.data

    @property
    def flops(self) -> float:
        """Floating-point operations of a step over all GPUs, recomputation not counted."""
        projections = 6.0 * self.hidden * self.hidden
        rest = 2.0 * self.hidden * (self.hidden + 2 * self.wide + 2.0 * self.sequence_length)
        last = self.tokens * projections + self.last_tokens * rest
        head = 2.0 * self.head_tokens * self.hidden * self.head_columns
        layers = (sum(self.num_layers) - 1) * self.tokens * (projections + rest) + last
        return 3.0 * self.num_micro_batches * self.data * (layers + head)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; they add up to ``total``.

    Attributes:
        computation: The busiest stage's arithmetic and memory traffic, recomputation included.
        tensor_messages: Its collectives between tensor-parallel ranks.
        pipeline_messages: Its messages to neighbouring stages that computation does not hide.
        bubble: Waiting for the pipeline to fill and drain.
        data_messages: Reducing gradients and gathering weights, beyond what computation hides.
        optimizer: Updating the weights.
    """

    computation: float
    tensor_messages: float
    pipeline_messages: float
    bubble: float
    data_messages: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.busy + self.bubble + self.data_messages + self.optimizer

    @property
    def busy(self) -> float:
        """Seconds the busiest stage works on its micro-batches."""
        return self.computation + self.tensor_messages + self.pipeline_messages


def matrix_seconds(rows: float, inner: float, columns: float, gpu: Gpu) -> float:
    """Return the seconds of one matrix product [rows, inner] x [inner, columns].

    Each dimension d costs a factor d / (d + HALF_SIZE) of the reachable rate: small products leave tiles empty.
    """
    share = gpu.matrix_share
    for size in (rows, inner, columns):
        share *= size / (size + HALF_SIZE)
    return 2.0 * rows * inner * columns / (gpu.tflops * 1e12 * share)


def layer_seconds(work: Work, gpu: Gpu, is_last: bool = False) -> float:
    """Return the seconds one layer, or the last one, computes for one micro-batch, forward and backward.

    The backward pass costs twice the forward pass; ``full`` recomputation adds a forward pass, ``selective`` that of
    attention. Kernels cannot be started faster than Python launches them.
    """
    hidden, wide, tensor = work.hidden, work.wide, work.tensor
    tokens, kept = (work.last_tokens, work.last_bytes) if is_last else (work.tokens, work.layer_bytes)
    matrices = (
        matrix_seconds(work.tokens, hidden, 3 * hidden / tensor, gpu)
        + matrix_seconds(tokens, hidden / tensor, hidden, gpu)
        + matrix_seconds(tokens, hidden, wide / tensor, gpu)
        + matrix_seconds(tokens, wide / tensor, hidden, gpu)
    )
    rate = gpu.tflops * 1e12 * gpu.matrix_share * ATTENTION_SHARE
    attention = 4.0 * tokens * hidden * work.sequence_length / tensor / rate
    unfused = work.unfused_bytes * tokens / work.tokens
    traffic = (TRAFFIC_FACTOR * kept + unfused) / (gpu.memory_gb_per_second * 1e9)
    again = {"none": 0.0, "selective": attention, "full": matrices + attention + traffic / 3}[work.recompute]
    passes = {"none": 1.0, "selective": 1.1, "full": 4 / 3}[work.recompute]
    computed = 3 * (matrices + attention) + traffic + again
    return max(computed, passes * KERNELS_A_LAYER * KERNEL_SECONDS)


def head_seconds(work: Work, gpu: Gpu) -> float:
    """Return the seconds of the head for one micro-batch, forward and backward."""
    return 3 * matrix_seconds(work.head_tokens, work.hidden, work.head_columns / work.tensor, gpu)


def tensor_seconds(work: Work, gpu: Gpu) -> float:
    """Return the seconds of one layer's collectives for one micro-batch (Shoeybi et al. 2019, Korthikanti et al. 2022).

    Two all-reductions forward and two backward; sequence parallelism splits each into a scatter and a gather of the
    same volume and gathers twice more in the backward pass. They are not hidden.
    """
    if work.tensor == 1:
        return 0.0
    volume = work.tokens * work.hidden * work.element * (work.tensor - 1) / work.tensor
    halves = 8 + (2 if work.sequence else 0) + (4 if work.recompute == "full" else 0)
    inside = work.tensor <= gpu.gpus_per_node
    bandwidth = (gpu.link_gb_per_second if inside else gpu.network_gb_per_second) * 1e9 * LINK_SHARE
    shown = TENSOR_SHOWN if work.tensor_overlap else 1.0
    return halves * (volume / bandwidth + LATENCY_SECONDS / 2) * shown


def pipeline_seconds(work: Work, gpu: Gpu) -> float:
    """Return the seconds a middle stage spends on messages of one micro-batch; interleaving hides all but latency."""
    if work.pipeline == 1:
        return 0.0
    if work.virtual_pipeline > 1:
        return 2 * work.virtual_pipeline * LATENCY_SECONDS
    volume = work.tokens * work.hidden * work.element / (work.tensor if work.sequence else 1)
    inside = work.num_gpus <= gpu.gpus_per_node
    bandwidth = (gpu.link_gb_per_second if inside else gpu.network_gb_per_second) * 1e9 * LINK_SHARE
    return 2 * (volume / bandwidth + LATENCY_SECONDS)


def data_bandwidth(work: Work, gpu: Gpu) -> float:
    """Return bytes a second of collectives over data-parallel ranks, which megatron-core places next to tensor ranks.

    A group that spans machines uses the network ports of all its ranks in a machine.
    """
    in_node = max(1.0, min(work.data, gpu.gpus_per_node // work.tensor))
    inside = gpu.link_gb_per_second
    across = min(inside, gpu.network_gb_per_second * in_node)
    return (inside if work.data <= in_node else across) * 1e9 * LINK_SHARE


def data_seconds(work: Work, gpu: Gpu, stage_seconds: float) -> float:
    """Return the seconds of gradient reduction and weight gathering that computation does not hide.

    fp32 gradients are reduced, weights gathered in their own precision; without the distributed optimizer gradients are
    all-reduced. Overlapped, the reduction runs beside the last micro-batch's backward pass and the gathering beside the
    first one's forward pass.

    Args:
        work: The run.
        gpu: Its GPUs.
        stage_seconds: Forward and backward pass of one micro-batch on a stage.
    """
    if work.data == 1:
        return 0.0
    count = max(work.stage_parameters)
    ring = (work.data - 1) / work.data / data_bandwidth(work, gpu)
    latency = LATENCY_SECONDS * math.log2(work.data)
    reduction = 4.0 * count * ring + latency
    gathering = (work.element if work.distributed_optimizer else 4.0) * count * ring + latency
    if not work.overlap:
        return reduction + gathering
    after = gathering if not work.distributed_optimizer else max(0.0, gathering - stage_seconds / 3)
    return max(0.0, reduction - stage_seconds * 2 / 3) + after


def step_time(work: Work, gpu: Gpu) -> StepTime:
    """Return the predicted seconds of a step, by part.

    With T_i the seconds stage i works on a micro-batch, m micro-batches and v chunks a stage, a step takes
    m max(T) + (sum(T) - max(T)) / v (Narayanan et al. 2021), and what follows the last backward pass.
    """
    layer, messages = layer_seconds(work, gpu), tensor_seconds(work, gpu)
    # What the last stage computes beside so many whole layers.
    head = head_seconds(work, gpu) + layer_seconds(work, gpu, is_last=True) - layer
    neighbours = pipeline_seconds(work, gpu)
    last = work.pipeline - 1
    stages = [
        count * (layer + messages) + neighbours + (head if stage == last else 0.0)
        for stage, count in enumerate(work.num_layers)
    ]
    slowest = max(range(len(stages)), key=stages.__getitem__)
    num, layers = work.num_micro_batches, work.num_layers[slowest]
    shards = work.data if work.distributed_optimizer else 1
    update = OPTIMIZER_TRAFFIC * max(work.stage_parameters) / shards / (gpu.memory_gb_per_second * 1e9)
    return StepTime(
        computation=num * (layers * layer + (head if slowest == last else 0.0)),
        tensor_messages=num * layers * messages,
        pipeline_messages=num * neighbours,
        bubble=(sum(stages) - stages[slowest]) / work.virtual_pipeline,
        data_messages=data_seconds(work, gpu, stages[slowest]),
        optimizer=update,
    )


def model_flops_utilisation(work: Work, gpu: Gpu, seconds: float) -> float:
    """Return MFU: the step's arithmetic over what the GPUs' data sheet allows in ``seconds``."""
    return work.flops / (seconds * work.num_gpus * gpu.tflops * 1e12)
