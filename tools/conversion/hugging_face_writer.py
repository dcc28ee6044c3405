"""Write a ProteinBert as a folder that transformers loads: weights, configuration, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaprot.common.files import write_json_atomically
from megaprot.tools.conversion.hugging_face_config import architecture_of, hugging_face_config
from megaprot.tools.conversion.hugging_face_reader import CONFIG, first_positions
from megaprot.tools.conversion.names import (
    BIAS,
    ESM,
    POSITIONS,
    WORDS,
    Architecture,
    Rule,
    our_shapes,
    position_shift,
    rules,
    split_qkv,
    their_shapes,
)
from megaprot.tools.conversion.safetensors_files import SHARD_BYTES, write_file, write_model
from megaprot.tools.conversion.source_model import CARRIED, SourceModel
from megaprot.tools.conversion.tensor_source import TensorInfo, made_ahead
from megaprot.tools.conversion.tokenizer import write_tokenizer


def _their_tensors(
    source: SourceModel, architecture: Architecture, rule: Rule, extra: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """Return what one tensor of ours becomes; rows beyond the vocabulary that are not zero go into ``extra``."""
    tensor = source.tensors.read(rule.ours)
    if len(rule.theirs) > 1:
        return split_qkv(tensor, source.model.num_attention_heads)
    size, shift = source.vocabulary.size, position_shift(architecture, source.vocabulary)
    if rule.ours in (WORDS, BIAS):
        if bool(tensor[size:].any()):
            extra[rule.ours] = tensor[size:].clone()
        return (tensor[:size],)
    if rule.ours == POSITIONS and shift:
        unused = tensor.new_zeros((shift, tensor.shape[1]))
        first = source.carried.get(first_positions(architecture, shift), unused)
        return (torch.cat((first.to(tensor.dtype), tensor)),)
    return (tensor,)


def _beside(source: SourceModel, architecture: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the class's tensors that ProteinBert has not: those carried along, else zeros."""
    model = source.model
    shift = position_shift(architecture, source.vocabulary)
    if architecture is ESM:
        # An untrained contact head that says 0.5 everywhere; transformers would draw one and warn.
        heads = model.num_layers * model.num_attention_heads
        empty = {"weight": torch.zeros((1, heads), dtype=dtype), "bias": torch.zeros(1, dtype=dtype)}
        found = {f"esm.contact_head.regression.{kind}": tensor for kind, tensor in empty.items()}
    else:
        types = torch.zeros((2, model.hidden_size), dtype=dtype)
        found = {"bert.embeddings.token_type_embeddings.weight": types}
    saved = source.tensors.infos[WORDS].dtype
    for name, part in source.carried.items() if source.architecture == architecture.name else ():
        if name != first_positions(architecture, shift):
            # Weights are rounded as all others are; rotary frequencies would spoil the positions.
            found[name] = part.to(dtype) if part.dtype == saved and not name.endswith("inv_freq") else part
    return found


def write_weights(source: SourceModel, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights, each read, changed and written before the next is read.

    Args:
        source: The model.
        folder: Where to.
        dtype: Data type of the weights.
        shard_bytes: Most bytes of elements in one file.
    """
    architecture = architecture_of(source)
    shapes = our_shapes(source.model, source.vocabulary, source.num_positions)
    shift = position_shift(architecture, source.vocabulary)
    table = list(rules(architecture, source.model))
    infos = {
        theirs: TensorInfo(dtype, shape)
        for rule in table
        for theirs, shape in zip(
            rule.theirs, their_shapes(rule, shapes[rule.ours], source.vocabulary.size, shift), strict=True
        )
    }
    beside, extra = _beside(source, architecture, dtype), dict[str, Tensor]()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for rule in table:
            parts = list(_their_tensors(source, architecture, rule, extra))
            for name in rule.theirs:
                yield name, parts.pop(0).to(dtype)  # nothing is kept of a tensor that has been written
        yield from beside.items()

    infos |= {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in beside.items()}
    write_model(folder, made_ahead(tensors()), infos, shard_bytes)
    if extra:
        carried = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()}
        write_file(folder / CARRIED, extra.items(), carried)


def write_hugging_face(source: SourceModel, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration and tokenizer; the model card comes last, by :func:`model_card.write_card`."""
    architecture = architecture_of(source)
    write_weights(source, folder, dtype)
    write_json_atomically(folder / CONFIG, hugging_face_config(source, architecture, dtype))
    write_tokenizer(source.vocabulary, folder, source.num_positions if _is_limited(source) else 0)


def _is_limited(source: SourceModel) -> bool:
    """True where positions are learned, so that longer sequences have none."""
    return source.model.position_embedding == "learned"
