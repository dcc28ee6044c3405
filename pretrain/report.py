"""What a run says of itself: the lines at its start, a row of numbers an interval, a line for the terminal."""

from __future__ import annotations

import importlib.util
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megaprot.pretrain.blend import Blend
from megaprot.pretrain.checkpoint import TrainingState
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.engine import layers_per_chunk
from megaprot.pretrain.model.attention import resolve_backend
from megaprot.pretrain.optimizer import learning_rate
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.step import StepResult
from megaprot.pretrain.stream import StreamPosition, TrainingStream
from megaprot.pretrain.throughput import peak_memory_bytes, peak_tflops, training_flops

if TYPE_CHECKING:
    from megaprot.pretrain.training import Interval


def fused_parts() -> str:
    """Return which optional fused packages this machine has, in one line."""
    parts = []
    te = importlib.util.find_spec("transformer_engine") is not None
    parts.append(f"Transformer Engine {'installed' if te else 'not installed'}")
    parts.append(_apex())
    return "; ".join(parts)


def _apex() -> str:
    """Return what the package called ``apex`` is: PyPI's is another project, NVIDIA's is built from source."""
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return "NVIDIA apex not installed"
    folders = map(Path, apex.submodule_search_locations or ())
    nvidia = any((folder / "optimizers").is_dir() for folder in folders)  # looked up without importing it
    return "NVIDIA apex installed, not used" if nvidia else "the package called apex is not NVIDIA's"


def count_parameters(config: PretrainConfig, vocabulary_size: int) -> int:
    """Return the weights of the model, the tied embedding once and without vocabulary padding."""
    hidden, feed_forward = config.model.hidden_size, config.model.feed_forward_size
    layer = 4 * hidden * hidden + 2 * hidden * feed_forward + 9 * hidden + feed_forward
    positions = 0 if config.model.position_embedding == "rotary" else config.data.max_sequence_length * hidden
    head = hidden * hidden + 3 * hidden + vocabulary_size
    return config.model.num_layers * layer + vocabulary_size * hidden + positions + 2 * hidden + head


def describe_run(
    config: PretrainConfig,
    blend: Blend,
    stream: TrainingStream,
    chunks: list[DistributedDataParallel],
    place: Place,
) -> list[str]:
    """Return the lines that say what runs: model, layout, kernels, data."""
    model, parallel, train = config.model, config.parallel, config.train
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    layers = layers_per_chunk(model.num_layers, num_chunks, parallel.pipeline_layout)
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU (gloo)"
    kernel = resolve_backend(model, train.precision)
    millions = count_parameters(config, blend.vocabulary.size) / 1e6
    unit = "residues" if blend.vocabulary.is_per_residue else "tokens"
    num_rows = sum(stream.num_rows(0, corpus) for corpus in range(len(blend.train)))
    return [
        f"model     {millions:.1f} M parameters: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads, {model.position_embedding} positions, "
        f"{model.activation}, vocabulary {blend.vocabulary.name}",
        f"layout    {place.world_size} x {device}: TP {parallel.tensor}, PP {parallel.pipeline} (layers a chunk "
        f"{' '.join(map(str, layers))}), DP {place.data_size}, "
        f"sequence parallel {'on' if parallel.sequence else 'off'}, "
        f"distributed optimizer {'on' if parallel.distributed_optimizer else 'off'}",
        f"kernels   attention {kernel}, LayerNorm torch, AdamW torch fused, {train.precision}, "
        f"recompute {train.recompute} ({fused_parts()})",
        f"data      {blend.num_sequences:,} sequences, {blend.num_residues:,} {unit}; an epoch has "
        f"{num_rows:,} rows of {config.data.row_tokens} tokens; {train.global_batch_rows} rows a step",
    ]


def _largest_memory(place: Place) -> float:
    memory = torch.tensor(peak_memory_bytes(), dtype=torch.float64, device=place.device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    return float(memory)


def interval_row(
    config: PretrainConfig,
    vocabulary_size: int,
    state: TrainingState,
    result: StepResult,
    interval: Interval,
    place: Place,
) -> dict[str, float]:
    """Return the numbers of the interval that ends at this step; all ranks call it, since memory is the largest rank's.

    Rates count real residues; MFU is the arithmetic of ``training_flops`` over the devices' peak, and left out where
    the peak is unknown.
    """
    seconds = max(time.perf_counter() - interval.started, 1e-9)
    flops = training_flops(config.model, vocabulary_size, interval.tokens, interval.squared_lengths, interval.masked)
    tflops = flops / seconds / 1e12 / place.world_size
    row = {
        "step": state.step,
        "loss": interval.tally.mean_loss,
        "perplexity": interval.tally.perplexity,
        "masked_accuracy": interval.tally.accuracy,
        "mask_perplexity": interval.tally.mask_perplexity,
        "learning_rate": learning_rate(state.step - 1, config.optim, config.train.num_steps),
        "grad_norm": result.grad_norm,
        "residues_per_second": interval.residues / seconds,
        "tflops_per_device": tflops,
        "memory_gb": _largest_memory(place) / 1e9,
        "consumed_rows": state.consumed_rows,
        "consumed_residues": state.consumed_residues,
        "epoch": StreamPosition.from_dict(state.position).corpora[0].epoch,
        "skipped_steps": state.skipped_steps,
        "seconds_left": seconds / max(interval.num_steps, 1) * (config.train.num_steps - state.step),
    }
    peak = peak_tflops(config.run.peak_tflops)
    if peak:
        row["mfu"] = tflops / peak
    return row


def progress_line(row: dict[str, float]) -> str:
    """Return one line for the terminal from an interval's row."""
    mfu = f"  MFU {100 * row['mfu']:.1f} %" if "mfu" in row else ""
    left = timedelta(seconds=round(row["seconds_left"]))
    return (
        f"step {int(row['step']):>7}  loss {row['loss']:.4f}  perplexity {row['perplexity']:.3f}  "
        f"accuracy {row['masked_accuracy']:.3f}  lr {row['learning_rate']:.2e}  grad norm {row['grad_norm']:.3f}  "
        f"{row['residues_per_second']:,.0f} residues/s  {row['tflops_per_device']:.3f} TFLOP/s{mfu}  "
        f"{row['memory_gb']:.2f} GB  left {left}"
    )
