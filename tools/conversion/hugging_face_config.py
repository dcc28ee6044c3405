"""Between ProteinBert's configuration and ``config.json`` of transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import ModelConfig
from megaprot.tools.conversion.names import ARCHITECTURES, ESM, MEGATRON_BERT, Architecture, position_shift
from megaprot.tools.conversion.source_model import SourceModel

_TANH = ("gelu_new", "gelu_pytorch_tanh")
_ROTARY_BASE = 10000.0


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); restore it.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; restore it.")
    return value


def architecture_of(source: SourceModel) -> Architecture:
    """Return transformers' class for a model: the one it came from, else ESM for erf and MegatronBert for tanh.

    Raises:
        InputError: No class computes what the model does.
    """
    model = source.model
    if model.activation == "gelu_erf" and source.architecture != MEGATRON_BERT.name:
        return ESM
    if model.position_embedding == "rotary":
        raise InputError(
            "no class of transformers has rotary positions with tanh GELU; only models with model.activation gelu_erf "
            "or model.position_embedding learned can be converted."
        )
    if model.token_dropout:
        raise InputError("MegatronBertForMaskedLM has no token dropout; only models without it can be converted.")
    return MEGATRON_BERT


def hugging_face_config(source: SourceModel, architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``config.json``, every value written that transformers would otherwise fill in."""
    model, vocabulary = source.model, source.vocabulary
    values: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": vocabulary.size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.feed_forward_size,
        "hidden_act": "gelu" if model.activation == "gelu_erf" else _TANH[1],
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "max_position_embeddings": source.num_positions + position_shift(architecture, vocabulary),
        "initializer_range": model.initial_std,
        "layer_norm_eps": model.layer_norm_epsilon,
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.begin,
        "eos_token_id": vocabulary.end if vocabulary.end >= 0 else None,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": False,
    }
    if architecture is MEGATRON_BERT:
        return values | {"position_embedding_type": "absolute", "type_vocab_size": 2}
    return values | {
        "position_embedding_type": "rotary" if model.position_embedding == "rotary" else "absolute",
        "mask_token_id": vocabulary.mask,
        "token_dropout": model.token_dropout,
        "emb_layer_norm_before": False,
        "is_folding_model": False,
        "esmfold_config": None,
        "vocab_list": None,
    }


def architecture_named(config: dict[str, Any], folder: Path) -> Architecture:
    """Return the class of a Hugging Face folder; raises InputError for one whose model is no ProteinBert."""
    model_type, named = config.get("model_type", ""), (config.get("architectures") or [""])[0]
    if model_type == "bert":
        raise InputError(
            f"{folder} is a BERT ({named}), which normalises after each block and after the embedding; ProteinBert "
            "normalises before each block, so no change of names converts it: use it in the Hugging Face format."
        )
    architecture = next((one for one in ARCHITECTURES.values() if one.model_type == model_type), None)
    if architecture is None or named not in ("", architecture.name):
        raise InputError(
            f"{folder} holds a {named or model_type or 'model without a type'}; give one of {', '.join(ARCHITECTURES)}."
        )
    return architecture


def _require(condition: bool, folder: Path, what: str) -> None:
    if not condition:
        raise InputError(f"{folder / 'config.json'} has {what}, which ProteinBert has not; give another model.")


def model_of(
    config: dict[str, Any], architecture: Architecture, vocabulary: Vocabulary, folder: Path
) -> tuple[ModelConfig, int]:
    """Return ProteinBert's shape and its number of positions for ``config.json``.

    Raises:
        InputError: The configuration lacks a value, or asks for what ProteinBert does not compute.
    """
    positions = config.get("position_embedding_type", "absolute")
    _require(positions in ("absolute", "rotary"), folder, f"the positions {positions!r}")
    _require(architecture is ESM or positions == "absolute", folder, "rotary positions in this class")
    _require(not config.get("is_decoder"), folder, "is_decoder set")
    _require(not config.get("emb_layer_norm_before"), folder, "emb_layer_norm_before set")
    _require(not config.get("is_folding_model"), folder, "is_folding_model set")
    _require(config.get("rope_theta", _ROTARY_BASE) == _ROTARY_BASE, folder, "another base of rotary positions")
    # transformers' ESM tells padding (for learned positions) and masks (for token dropout) by these ids.
    pad, mask = config.get("pad_token_id"), config.get("mask_token_id")
    _require(architecture is not ESM or positions == "rotary" or pad == vocabulary.pad, folder, f"pad_token_id {pad}")
    _require(not config.get("token_dropout") or mask == vocabulary.mask, folder, f"mask_token_id {mask}")
    activation = config.get("hidden_act", "gelu") if architecture is MEGATRON_BERT else "gelu"
    _require(activation in ("gelu", *_TANH), folder, f"the activation {activation!r}")
    try:
        if config["vocab_size"] != vocabulary.size:
            raise InputError(
                f"{folder / 'config.json'} has {config['vocab_size']} tokens, but the vocabulary {vocabulary.name} has "
                f"{vocabulary.size}; name the right one with --vocabulary."
            )
        model = ModelConfig(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_attention_heads=int(config["num_attention_heads"]),
            ffn_hidden_size=int(config["intermediate_size"]),
            position_embedding="rotary" if positions == "rotary" else "learned",
            activation="gelu_erf" if activation == "gelu" else "gelu_tanh",
            layer_norm_epsilon=float(config["layer_norm_eps"]),
            hidden_dropout=float(config.get("hidden_dropout_prob", 0.1)),
            attention_dropout=float(config.get("attention_probs_dropout_prob", 0.1)),
            token_dropout=bool(config.get("token_dropout", False)),
            initial_std=float(config.get("initializer_range", 0.02)),
        )
        return model, int(config["max_position_embeddings"]) - position_shift(architecture, vocabulary)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} lacks or garbles a value ({error}); restore it.") from error
