"""What can be known to be wrong before any process is started: layout, batch, corpus, and the run that would go on."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch

from megaprot.common.errors import InputError
from megaprot.common.manifest import damaged_file
from megaprot.common.masking import MaskingConfig, masked_capacity
from megaprot.common.packing_plan import check_row_shape
from megaprot.pretrain.blend import Blend, folders_and_weights, open_blend
from megaprot.pretrain.checkpoint import (
    newest_whole_by_size,
    problem_of,
    read_config,
    read_state,
    read_vocabulary,
)
from megaprot.pretrain.config import DataConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from megaprot.pretrain.engine import check_fp8, layers_per_chunk
from megaprot.pretrain.model.attention import resolve_backend
from megaprot.pretrain.model.protein_bert import VOCABULARY_MULTIPLE
from megaprot.pretrain.rows import RowShape

# Of masked positions in a row, and of a rank's share of them under FP8.
_CAPACITY_MULTIPLE, _FP8_MULTIPLE = 64, 32
_ARCHITECTURE_KEYS = (
    *(f"model.{key}" for key in ("num_layers", "hidden_size", "num_attention_heads", "position_embedding")),
    *(f"model.{key}" for key in ("activation", "layer_norm_epsilon", "token_dropout")),
)
# A run goes on only with the same values of these: the others may change between restarts.
_FIXED_KEYS = (
    *_ARCHITECTURE_KEYS,
    *(f"data.{key}" for key in ("row_tokens", "max_sequence_length", "mask_probability", "mask_span_length")),
    *("data.sampling", "parallel.distributed_optimizer", "train.precision", "run.seed"),
)
_NOT_NEGATIVE = (
    *(f"train.{key}" for key in ("eval_interval", "save_interval", "keep_checkpoints", "eval_rows", "spike_window")),
    *("train.max_minutes", "optim.warmup_steps", "optim.decay_steps", "optim.weight_decay", "optim.clip_grad"),
    *("optim.min_lr", "data.num_workers", "model.ffn_hidden_size", "run.peak_tflops"),
)
_POSITIVE = (
    *(f"train.{key}" for key in ("num_steps", "log_interval", "spike_sigma", "max_skipped_steps")),
    *("train.initial_loss_scale", "optim.lr", "optim.epsilon", "model.initial_std", "model.layer_norm_epsilon"),
    *("run.timeout_minutes", "data.row_tokens", "data.max_sequence_length"),
)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise InputError(sentence)


def masking_of(data: DataConfig) -> MaskingConfig:
    """Return the masking settings of a data section; raises InputError for what is no probability."""
    return MaskingConfig(data.mask_probability, data.mask_token_fraction, data.random_fraction, data.mask_span_length)


def row_shape_of(data: DataConfig, tensor: int, has_fp8: bool) -> RowShape:
    """Return what rows are like, with room for masked positions that ``tensor`` ranks can share evenly."""
    masking = masking_of(data)
    share = _FP8_MULTIPLE if has_fp8 else 1
    capacity = masked_capacity(data.row_tokens, masking, math.lcm(_CAPACITY_MULTIPLE, share * tensor))
    return RowShape(data.row_tokens, data.max_sequence_length, masking, capacity)


def check_model(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise InputError for a shape that cannot be built or split by the layout."""
    heads, tensor = model.num_attention_heads, parallel.tensor
    for name, value in asdict(model).items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "ffn_hidden_size":
            _require(value > 0, f"model.{name} is {value}; give a positive number.")
    _require(
        model.hidden_size % heads == 0,
        f"model.hidden_size {model.hidden_size} is not divisible by model.num_attention_heads {heads}.",
    )
    _require(
        model.position_embedding != "rotary" or (model.hidden_size // heads) % 2 == 0,
        f"rotary positions need an even head size, {model.hidden_size} / {heads} is odd; change the number of heads.",
    )
    split = (heads, VOCABULARY_MULTIPLE, model.feed_forward_size)
    dividing = [size for size in range(1, heads + 1) if not any(whole % size for whole in split)]
    _require(
        tensor in dividing,
        f"parallel.tensor {tensor} does not divide the model (heads {heads}, feed-forward {model.feed_forward_size}, "
        f"padded vocabulary {VOCABULARY_MULTIPLE}); choose one of {', '.join(map(str, dividing))}.",
    )
    for name in ("hidden_dropout", "attention_dropout"):
        _require(0.0 <= getattr(model, name) < 1.0, f"model.{name} is {getattr(model, name)}; give a share below 1.")


def check_layout(config: PretrainConfig, num_processes: int) -> int:
    """Return the data-parallel size of the layout on ``num_processes``; raises InputError where it does not fit."""
    parallel, num_layers = config.parallel, config.model.num_layers
    for name in ("tensor", "pipeline", "virtual_pipeline"):
        _require(getattr(parallel, name) >= 1, f"parallel.{name} is {getattr(parallel, name)}; give 1 or more.")
    chunks = parallel.pipeline * parallel.virtual_pipeline
    _require(
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        "parallel.virtual_pipeline interleaves pipeline stages; it needs parallel.pipeline of 2 or more.",
    )
    _require(
        chunks <= num_layers,
        f"parallel.pipeline x parallel.virtual_pipeline asks for {chunks} chunks, but the model has only {num_layers} "
        "layers; use fewer stages.",
    )
    layout = layers_per_chunk(num_layers, chunks, parallel.pipeline_layout)
    _require(
        len(layout) == chunks and sum(layout) == num_layers and min(layout) > 0,
        f"parallel.pipeline_layout {layout} must hold {chunks} positive numbers that add up to {num_layers} layers.",
    )
    _require(
        not parallel.sequence or (parallel.tensor > 1 and config.data.row_tokens % parallel.tensor == 0),
        "parallel.sequence needs parallel.tensor of 2 or more that divides data.row_tokens.",
    )
    _require(
        not parallel.overlap_communication or torch.cuda.is_available(),
        "parallel.overlap_communication needs CUDA devices; switch it off here.",
    )
    model_size = parallel.tensor * parallel.pipeline
    _require(
        num_processes % model_size == 0,
        f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} needs a multiple of {model_size} "
        f"processes, but there are {num_processes}; start it with megaprot launch local --nproc {model_size}.",
    )
    return num_processes // model_size


def check_devices(num_processes: int) -> None:
    """Raise InputError where this machine has CUDA devices, but fewer than it is to have processes."""
    here, num_devices = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)), torch.cuda.device_count()
    _require(
        num_devices == 0 or here <= num_devices,
        f"{here} processes cannot share {num_devices} CUDA device(s); start at most {num_devices} here, or set "
        "CUDA_VISIBLE_DEVICES= to train on the CPU.",
    )


def batch_rows_at(step: int, train: TrainConfig) -> int:
    """Return the rows of the global batch at optimizer step ``step``: ramped up in equal stretches, then constant."""
    start, increment = train.ramp_up_start_rows, train.ramp_up_increment_rows
    if not start or step >= train.ramp_up_steps:
        return train.global_batch_rows
    num_increments = (train.global_batch_rows - start) // increment
    return start + increment * (step * num_increments // train.ramp_up_steps)


def check_batch(train: TrainConfig, parallel: ParallelConfig, data_size: int) -> None:
    """Raise InputError where a batch of the run cannot be dealt to ranks and pipeline evenly."""
    if train.ramp_up_start_rows:
        start, increment, end = train.ramp_up_start_rows, train.ramp_up_increment_rows, train.global_batch_rows
        _require(
            increment > 0 and train.ramp_up_steps > 0 and start < end and (end - start) % increment == 0,
            "train.ramp_up_start_rows needs ramp_up_steps and a ramp_up_increment_rows that leads from it to "
            f"global_batch_rows, but {start} + n x {increment} never is {end}.",
        )
        batches = set(range(start, end + 1, increment))
    else:
        _require(
            not (train.ramp_up_increment_rows or train.ramp_up_steps),
            "train.ramp_up_increment_rows and ramp_up_steps need train.ramp_up_start_rows; give all three.",
        )
        batches = {train.global_batch_rows}
    group = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    for rows in sorted(batches):
        _require(
            rows > 0 and rows % (data_size * group) == 0,
            f"a global batch of {rows} rows cannot be dealt to {data_size} data-parallel ranks"
            + (f" in groups of {group} (interleaved pipeline)" if group > 1 else "")
            + f"; make train.global_batch_rows and its ramp-up multiples of {data_size * group}.",
        )


def check_numbers(config: PretrainConfig) -> None:
    """Raise InputError for lengths, rates and intervals that no run can have."""
    for key in (*_NOT_NEGATIVE, *_POSITIVE):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        _require(value >= 0 and math.isfinite(value), f"{key} is {value}; give 0 or more.")
        _require(value > 0 or key in _NOT_NEGATIVE, f"{key} is {value}; give a number above 0.")
    optim = config.optim
    _require(
        optim.min_lr <= optim.lr,
        f"optim.min_lr {optim.min_lr} is above optim.lr {optim.lr}; the rate would rise: lower optim.min_lr.",
    )
    _require(
        optim.decay_steps == 0 or optim.decay_steps > optim.warmup_steps,
        f"optim.decay_steps {optim.decay_steps} ends within the {optim.warmup_steps} warm-up steps; give 0 or more.",
    )
    for name in ("beta1", "beta2"):
        value = getattr(config.optim, name)
        _require(0 <= value < 1, f"optim.{name} is {value}; give a number from 0 to below 1.")
    for package, wanted in (("tensorboard", config.run.tensorboard), ("wandb", bool(config.run.wandb_project))):
        _require(
            not wanted or importlib.util.find_spec(package) is not None,
            f"the package {package} is not installed; pip install megaprot[logging], or do without it.",
        )


def check_run_folder(config: PretrainConfig, blend: Blend) -> None:
    """Raise InputError where ``run.dir`` holds a run that this configuration cannot go on with."""
    folder = Path(config.run.dir)
    _require(not folder.is_file(), f"run.dir {folder} is a file; name a folder.")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    _require(
        above.is_dir() and os.access(above, os.W_OK),
        f"run.dir {folder} cannot be written to, because {above} does not allow it; name another folder.",
    )
    newest = newest_whole_by_size(folder / "checkpoints")
    if newest is None:
        check_initial_checkpoint(config, blend)
        return
    earlier = read_config(newest)
    for key in _FIXED_KEYS:
        section, name = key.split(".")
        old, new = (getattr(getattr(one, section), name) for one in (earlier, config))
        _require(
            old == new,
            f"{key} is {new}, but the run in {folder} began with {old}; keep it or name a new run.dir.",
        )
    _require(
        earlier.model.feed_forward_size == config.model.feed_forward_size,
        f"model.ffn_hidden_size differs from the run in {folder}; keep it or name a new run.dir.",
    )
    named = ", ".join(folders_and_weights(config.data))
    saved = read_vocabulary(newest)
    _require(
        saved == blend.vocabulary,
        f"the corpus {named} has the vocabulary {blend.vocabulary.name}, but the run in {folder} has "
        f"{saved.name}; preprocess with --vocabulary {saved.name} or name a new run.dir.",
    )
    _require(
        read_state(newest).data_fingerprint == blend.fingerprint,
        f"the corpus {named} is not the one the run in {folder} was trained on; give that one or name a new run.dir.",
    )


def check_initial_checkpoint(config: PretrainConfig, blend: Blend) -> None:
    """Raise InputError where ``run.initial_checkpoint`` is not whole or has another architecture or vocabulary."""
    if not config.run.initial_checkpoint:
        return
    folder = Path(config.run.initial_checkpoint)
    _require(
        folder.is_dir(),
        f"run.initial_checkpoint {folder} is not a folder; name one of megaprot convert --to megatron, or a step_... "
        "folder of another run.",
    )
    problem = problem_of(folder) or damaged_file(folder)
    _require(not problem, f"run.initial_checkpoint {folder} is not whole: {problem}; restore it or name another.")
    given = read_config(folder)
    wide, learned = given.model.feed_forward_size, given.model.position_embedding == "learned"
    for key in (*_ARCHITECTURE_KEYS, *(("data.max_sequence_length",) if learned else ())):
        section, name = key.split(".")
        old, new = (getattr(getattr(one, section), name) for one in (given, config))
        _require(old == new, f"{key} is {new}, but the weights of {folder} have {old}; set it so.")
    _require(
        wide == config.model.feed_forward_size,
        f"model.ffn_hidden_size is {config.model.feed_forward_size}, but the weights of {folder} have {wide}; set it "
        "so.",
    )
    saved = read_vocabulary(folder)
    _require(
        saved == blend.vocabulary,
        f"the training data have the vocabulary {blend.vocabulary.name}, but {folder} has {saved.name}; "
        f"preprocess with --vocabulary {saved.name}.",
    )


def validate(config: PretrainConfig, num_processes: int) -> Blend:
    """Check everything about a run that can be known before it starts, and open its corpora.

    Args:
        config: The run.
        num_processes: Processes it will have.

    Returns:
        Training and validation corpora.

    Raises:
        InputError: One sentence naming the first wrong key or file and the remedy.
    """
    check_numbers(config)
    check_model(config.model, config.parallel)
    data_size = check_layout(config, num_processes)
    check_devices(num_processes)
    check_batch(config.train, config.parallel, data_size)
    masking_of(config.data)
    resolve_backend(config.model, config.train.precision)
    check_fp8(config)
    blend = open_blend(config.data)
    check_row_shape(config.data.row_tokens, config.data.max_sequence_length, blend.vocabulary.num_boundary_tokens)
    check_run_folder(config, blend)
    return blend
