"""Read checkpoints of Megatron-LM up to 3.0 and of ProteinLM (Xiao et al. 2021): shards merged, code never run.

``iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt``, one file a tensor- and pipeline-parallel rank. The rows of a
shard's fused query-key-value projection lie, by ``checkpoint_version``: below 1.0 as [3, heads, head size], at 1.0 as
[heads, head size, 3], from 2.0 on as [heads, 3, head size], which is ProteinBert's own order.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.config import ModelConfig
from megaprot.tools.conversion.names import BIAS, POSITIONS, WORDS, our_shapes
from megaprot.tools.conversion.source_model import SourceModel
from megaprot.tools.conversion.tensor_source import (
    DerivedTensors,
    TensorInfo,
    common_dtype,
    require_no_others,
    require_shapes,
)
from megaprot.tools.conversion.torch_files import flat_tensors, load_plain

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d\d+)(?:_(\d\d\d))?$")
# The run's arguments, and numpy's random state, which old checkpoints hold beside the weights: plain records all.
_HARMLESS = (
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
)
_PARTS = {
    "input_layernorm": "input_layernorm",
    "attention.query_key_value": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_OUTSIDE = {
    "language_model.embedding.word_embeddings.weight": WORDS,
    "language_model.embedding.position_embeddings.weight": POSITIONS,
    "lm_head.bias": BIAS,
    "lm_head.dense.weight": "lm_head.dense.weight",
    "lm_head.dense.bias": "lm_head.dense.bias",
    "lm_head.layernorm.weight": "lm_head.layer_norm.weight",
    "lm_head.layernorm.bias": "lm_head.layer_norm.bias",
}
_LAYER = re.compile(r"language_model\.(?:transformer|encoder)\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_FINAL = re.compile(r"language_model\.(?:transformer|encoder)\.final_layernorm\.(weight|bias)$")
_COLUMNS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
_ROWS = ("linear_proj.weight", "linear_fc2.weight")
_LARGEST_VERSION = 3.0


def legacy_folder_of(folder: Path) -> Path | None:
    """Return the folder that holds the ``mp_rank`` folders: this one, or its newest iteration; None if there is none.

    Raises:
        InputError: ``latest_checkpointed_iteration.txt`` names an iteration that is not there.
    """
    if any(_RANK.match(entry.name) for entry in folder.iterdir()):
        return folder
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        inner = folder / (f"iter_{int(text):07d}" if text.isdigit() else "release")
        if inner.is_dir():
            return inner
        raise InputError(f"{tracker} names {text[:40]!r}, but {inner} is not there; name the folder of one iteration.")
    iterations = sorted(folder.glob("iter_???????"))
    return iterations[-1] if iterations else None


def _ranks(folder: Path) -> list[list[Path]]:
    """Return the files by pipeline stage, in each by tensor-parallel rank; raises InputError where one is missing."""
    found = {}
    for entry in folder.iterdir():
        match = _RANK.match(entry.name)
        if match:
            found[int(match[2] or 0), int(match[1])] = entry / FILE
    if not found:
        raise InputError(f"{folder} holds no mp_rank_00/{FILE}; name the folder of one whole iteration.")
    stages, ranks = (1 + max(key[axis] for key in found) for axis in (0, 1))
    staged = any("_" in path.parent.name.removeprefix("mp_rank_") for path in found.values())
    for stage in range(stages):
        for rank in range(ranks):
            path = found.get((stage, rank), folder / f"mp_rank_{rank:02d}{f'_{stage:03d}' if staged else ''}" / FILE)
            if not path.is_file():
                raise InputError(f"{path} is missing; copy the files of all ranks.")
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _our_name(name: str, first_layer: int) -> str:
    """Return ProteinBert's name of a legacy tensor, an empty string where it has none."""
    layer, final = _LAYER.match(name), _FINAL.match(name)
    if layer:
        part = _PARTS.get(layer[2].replace("self_attention", "attention"), "")
        return f"encoder.layers.{first_layer + int(layer[1])}.{part}.{layer[3]}" if part else ""
    return f"encoder.final_layernorm.{final[1]}" if final else _OUTSIDE.get(name, "")


def _shards(stages: list[list[dict[str, Any]]]) -> dict[str, list[Tensor]]:
    """Return the shards of every tensor by ProteinBert's name, in the order of the tensor-parallel ranks."""
    shards: dict[str, list[Tensor]] = {}
    first_layer = 0
    for stage in stages:
        num_layers = 0
        for rank in stage:
            for name, tensor in flat_tensors(rank["model"]).items():
                match = _LAYER.match(name)
                num_layers = max(num_layers, 1 + int(match[1]) if match else 0)
                ours = _our_name(name, first_layer)
                if ours:
                    shards.setdefault(ours, []).append(tensor)
        first_layer += num_layers
    return shards


def reorder_qkv(shard: Tensor, num_heads: int, version: float) -> Tensor:
    """Return a shard's fused projection with its rows as [heads, 3, head size], whatever version wrote it.

    Args:
        shard: Weight or bias of one tensor-parallel rank.
        num_heads: Heads of that rank.
        version: ``checkpoint_version``.
    """
    rest = shard.shape[1:]
    if version >= 2.0:
        return shard
    if version >= 1.0:
        return shard.view(num_heads, -1, 3, *rest).transpose(1, 2).reshape(shard.shape)
    return shard.view(3, num_heads, -1, *rest).transpose(0, 1).reshape(shard.shape)


def _axis(name: str) -> int:
    """Return the axis a tensor is split over tensor-parallel ranks; -1 where every rank has all of it."""
    if name in (WORDS, BIAS) or name.endswith(_COLUMNS):
        return 0
    return 1 if name.endswith(_ROWS) else -1


def _merged_shape(name: str, shards: list[Tensor], size: int, rows: int) -> tuple[int, ...]:
    shape, axis = list(shards[0].shape), _axis(name)
    if axis >= 0:
        shape[axis] = sum(shard.shape[axis] for shard in shards)
    if name in (WORDS, BIAS) and shape[0] >= size:  # padded to a multiple of 128 x ranks: cut, then padded as ours are
        shape[0] = rows
    return tuple(shape)


def _merge(name: str, shards: list[Tensor], num_heads: int, version: float, size: int, rows: int) -> Tensor:
    """Return one whole tensor of its shards, in ProteinBert's order and padding."""
    if "linear_qkv" in name:
        shards = [reorder_qkv(shard, num_heads // len(shards), version) for shard in shards]
    axis = _axis(name)
    merged = torch.cat(shards, axis) if axis >= 0 else shards[0].clone()
    if name in (WORDS, BIAS):
        padded = merged.new_zeros((rows, *merged.shape[1:]))
        padded[:size] = merged[:size]
        return padded
    return merged


def _version(first: Mapping[str, Any], given: float, where: Path) -> float:
    written = first.get("checkpoint_version")
    if written is None and given < 0:
        raise InputError(
            f"{where} does not say its checkpoint_version, by which query, key and value are ordered; give it as "
            "--legacy_version (0, 1.0, 2.0 or 3.0)."
        )
    if written is not None and given >= 0 and float(written) != given:
        raise InputError(f"{where} has checkpoint_version {written}, not {given}; leave out --legacy_version.")
    version = given if written is None else float(written)
    if not 0 <= version <= _LARGEST_VERSION:
        raise InputError(f"checkpoint_version {version} of {where} is unknown; give a checkpoint of 0 to 3.0.")
    return version


def _model_of(args: Mapping[str, Any], where: Path) -> tuple[ModelConfig, int]:
    """Return shape and number of positions of the run's arguments; raises InputError where they say something else."""
    if args.get("apply_residual_connection_post_layernorm"):
        raise InputError(f"{where} has residual connections after LayerNorm, which ProteinBert has not; give another.")
    tanh = args.get("openai_gelu", False) or args.get("bias_gelu_fusion", True)
    try:
        hidden = int(args["hidden_size"])
        model = ModelConfig(
            num_layers=int(args["num_layers"]),
            hidden_size=hidden,
            num_attention_heads=int(args["num_attention_heads"]),
            ffn_hidden_size=int(args.get("ffn_hidden_size") or 4 * hidden),
            position_embedding="learned",
            activation="gelu_tanh" if tanh else "gelu_erf",
            layer_norm_epsilon=float(args["layernorm_epsilon"]),
            hidden_dropout=float(args.get("hidden_dropout", 0.1)),
            attention_dropout=float(args.get("attention_dropout", 0.1)),
            initial_std=float(args.get("init_method_std", 0.02)),
        )
        return model, int(args["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the args in {where} lack or garble a value ({error}); give a checkpoint with them."
        ) from error


def read_legacy(folder: Path, given_version: float, vocabulary_name: str) -> SourceModel:
    """Return the model of a Megatron-LM checkpoint.

    Args:
        folder: What holds the ``mp_rank`` folders.
        given_version: ``checkpoint_version`` where the files do not say it; below 0 for none given.
        vocabulary_name: Vocabulary; the files do not say it.

    Raises:
        InputError: A shard is missing, damaged or does not fit, a value is missing, or a file holds more than plain
            values.
    """
    paths = _ranks(folder)
    stages = [[load_plain(path, _HARMLESS) for path in ranks] for ranks in paths]
    where, first = paths[0][0], stages[0][0]
    for path, rank in zip(chain(*paths), chain(*stages), strict=True):
        if not isinstance(rank, dict) or not isinstance(rank.get("model"), dict):
            raise InputError(f"{path} holds no model; give a checkpoint of Megatron-LM's BERT.")
    if not isinstance(first.get("args"), argparse.Namespace):
        raise InputError(
            f"{where} holds no args, which say heads and activation; give the checkpoint as training saved it."
        )
    args = vars(first["args"])
    for axis, found in (("tensor", len(paths[0])), ("pipeline", len(paths))):
        asked = args.get(f"{axis}_model_parallel_size", found)
        if asked != found:
            raise InputError(
                f"{folder} has files of {found} {axis}-parallel ranks instead of {asked}; copy all of them."
            )
    version = _version(first, given_version, where)
    (model, num_positions), vocabulary = _model_of(args, where), get_vocabulary(vocabulary_name)
    shards = _shards(stages)
    shapes = our_shapes(model, vocabulary, num_positions)
    size, rows = vocabulary.size, shapes[WORDS][0]
    for name, parts in shards.items():
        if len({part.shape for part in parts}) > 1 or len(parts) != len(paths[0]):
            raise InputError(f"the ranks' parts of {name} in {folder} do not fit together; copy the files of one save.")
    infos = {name: TensorInfo(parts[0].dtype, _merged_shape(name, parts, size, rows)) for name, parts in shards.items()}
    require_shapes(infos, shapes, folder)
    require_no_others(infos, shapes, folder)
    common_dtype((infos[name] for name in shapes), folder)

    def read(name: str) -> Tensor:
        return _merge(name, shards[name], model.num_attention_heads, version, size, rows)

    return SourceModel(
        tensors=DerivedTensors(infos, read),
        model=model,
        num_positions=num_positions,
        vocabulary=vocabulary,
        tanh_head=bool(args.get("openai_gelu", False)),
        facts={"Weights": f"Converted from a Megatron-LM checkpoint of version {version}."},
        sizes={"iteration": f"{first.get('iteration', 'unknown')}"},
    )
