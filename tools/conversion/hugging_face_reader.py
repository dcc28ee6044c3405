"""Read transformers' ``EsmForMaskedLM`` and ``MegatronBertForMaskedLM`` as a ProteinBert, tensor by tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import ModelConfig
from megaprot.tools.conversion.hugging_face_config import architecture_named, model_of, read_json
from megaprot.tools.conversion.names import (
    BIAS,
    MEGATRON_BERT,
    POSITIONS,
    WORDS,
    Architecture,
    Rule,
    fuse_qkv,
    our_shapes,
    position_shift,
    rules,
    their_shapes,
)
from megaprot.tools.conversion.safetensors_files import SafetensorsFile, SafetensorsFolder
from megaprot.tools.conversion.source_model import CARRIED, SourceModel
from megaprot.tools.conversion.tensor_source import (
    DerivedTensors,
    TensorInfo,
    TensorSource,
    common_dtype,
    require_shapes,
)
from megaprot.tools.conversion.tokenizer import read_vocabulary
from megaprot.tools.conversion.torch_files import read_pytorch_model

CONFIG = "config.json"
# Names that transformers has had, or writes again on saving: the first is read as the second.
_ALIASES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def open_weights(folder: Path) -> TensorSource:
    """Return the weights of a Hugging Face folder; raises InputError where there are none."""
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return SafetensorsFolder(folder)
    if (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
        return read_pytorch_model(folder)
    raise InputError(f"{folder} holds a config.json but no weights (model.safetensors); restore them.")


def with_present_names(weights: TensorSource) -> TensorSource:
    """Return the same weights under the names that transformers' modules have."""
    named = {}
    for name in weights.infos:
        present = name
        for old, new in _ALIASES:
            present = present.replace(old, new)
        named[present] = name
    infos = {present: weights.infos[name] for present, name in named.items()}
    return DerivedTensors(infos, lambda present: weights.read(named[present]))


def _our_tensor(
    name: str, weights: TensorSource, rule: Rule, model: ModelConfig, rows: int, shift: int, padding: dict[str, Tensor]
) -> Tensor:
    """Return one tensor of ProteinBert: fused, padded to ``rows``, or without the first ``shift`` positions."""
    if len(rule.theirs) > 1:
        return fuse_qkv([partial(weights.read, part) for part in rule.theirs], model.num_attention_heads)
    tensor = weights.read(rule.theirs[0])
    if name == POSITIONS:
        return tensor[shift:].clone()
    if name not in (WORDS, BIAS):
        return tensor
    filler = padding.get(name, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:])))
    return torch.cat((tensor, filler.to(tensor.dtype)))


def _require_no_further_layer(weights: TensorSource, architecture: Architecture, num_layers: int, folder: Path) -> None:
    prefix = architecture.layer.format("")
    for name in weights.infos:
        number = name.removeprefix(prefix).split(".")[0]
        if name.startswith(prefix) and number.isdigit() and int(number) >= num_layers:
            raise InputError(
                f"{folder} holds {name}, but its configuration has {num_layers} layers; restore the configuration it "
                "was saved with."
            )


def _carried(
    weights: TensorSource, architecture: Architecture, model: ModelConfig, known: set[str], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors ProteinBert has no place for; raises InputError where they change what is computed."""
    carried = {}
    for name in weights.infos:
        if name in architecture.tied:
            original = architecture.words if architecture.tied[name] == WORDS else architecture.bias
            if not torch.equal(weights.read(name), weights.read(original)):
                raise InputError(
                    f"{name} of {folder} is not tied to {original}; ProteinBert can only have one of them."
                )
        elif name not in known:
            carried[name] = weights.read(name)
    contact = carried.get("esm.contact_head.regression.weight")
    if contact is not None and contact.shape[-1] != model.num_layers * model.num_attention_heads:
        raise InputError(
            f"the contact head of {folder} has {contact.shape[-1]} weights instead of one a layer and head; restore "
            "the configuration it was saved with."
        )
    types = carried.get("bert.embeddings.token_type_embeddings.weight")
    if architecture is MEGATRON_BERT and types is not None and bool(types[0].any()):
        raise InputError(f"{folder} has token types that are not zero, which ProteinBert has not; give another model.")
    return carried


def read_hugging_face(
    folder: Path, vocabulary_name: str, config: dict[str, Any] | None = None, weights: TensorSource | None = None
) -> SourceModel:
    """Return the model of a Hugging Face folder.

    Args:
        folder: The folder; named in messages.
        vocabulary_name: Vocabulary of a folder without tokenizer files; empty reads it from them.
        config: Taken in place of its ``config.json``.
        weights: Taken in place of its weights.

    Raises:
        InputError: A file is missing or damaged, the vocabulary is none of ours, or the model is no ProteinBert.
    """
    config = read_json(folder / CONFIG) if config is None else config
    architecture = architecture_named(config, folder)
    weights = with_present_names(open_weights(folder) if weights is None else weights)
    vocabulary = read_vocabulary(folder, vocabulary_name)
    model, num_positions = model_of(config, architecture, vocabulary, folder)
    shift = position_shift(architecture, vocabulary)
    shapes = our_shapes(model, vocabulary, num_positions)
    by_name = {rule.ours: rule for rule in rules(architecture, model)}
    expected = {
        theirs: shape
        for rule in by_name.values()
        for theirs, shape in zip(
            rule.theirs, their_shapes(rule, shapes[rule.ours], vocabulary.size, shift), strict=True
        )
    }
    require_shapes(weights.infos, expected, folder)
    _require_no_further_layer(weights, architecture, model.num_layers, folder)
    dtype = common_dtype((weights.infos[name] for name in expected), folder)
    carried = _carried(weights, architecture, model, set(expected), folder)
    if model.position_embedding == "learned" and shift:
        carried[first_positions(architecture, shift)] = weights.read(architecture.positions)[:shift].clone()

    padding = _padding(folder, vocabulary, shapes)

    def read(name: str) -> Tensor:
        return _our_tensor(name, weights, by_name[name], model, shapes[WORDS][0], shift, padding)

    infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    facts = {"Weights": f"Imported from {architecture.name} in the folder {folder.name}."}
    return SourceModel(
        tensors=DerivedTensors(infos, read),
        model=model,
        num_positions=num_positions,
        vocabulary=vocabulary,
        architecture=architecture.name,
        carried=carried,
        tanh_head=model.activation == "gelu_tanh",
        facts=facts,
    )


def first_positions(architecture: Architecture, shift: int) -> str:
    """Return the name under which the rows before position 0 are carried."""
    return f"{architecture.positions}[:{shift}]"


def _padding(folder: Path, vocabulary: Vocabulary, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the rows beyond the vocabulary that our own export carries along, if they fit."""
    if not (folder / CARRIED).is_file():
        return {}
    file = SafetensorsFile(folder / CARRIED)
    return {
        name: file.read(name)
        for name in (WORDS, BIAS)
        if name in file.infos and file.infos[name].shape == (shapes[name][0] - vocabulary.size, *shapes[name][1:])
    }
