"""Open a Hugging Face model folder: its own classes, local files only, no code and no pickles from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from megaprot.common.errors import InputError
from megaprot.common.files import sha256_of
from megaprot.common.quiet import quiet
from megaprot.common.sentencepiece_model import MODEL_FILE
from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune import packed_attention
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.residues import vocabulary_of

MODEL_TYPES = ("esm", "bert", "megatron-bert")
"""Encoders that tests compare with transformers one sequence at a time."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "*.model")
"""Patterns of the files transformers keeps a tokenizer in."""
_NOT_NEEDED = ("contact_head", "position_ids", "pooler", "inv_freq")
"""Tensors a folder may lack."""


def load_encoder(
    folder: Path, *, with_head: bool = False, device: torch.device | None = None, precision: str = "fp32"
) -> Encoder:
    """Return the encoder of a folder that ``save_pretrained`` or ``megaprot convert`` wrote, in evaluation mode.

    Args:
        folder: ``config.json``, weights (safetensors, or ``.bin`` of tensors alone) and tokenizer files.
        with_head: Also load the masked-language model's head, for :meth:`Encoder.logits`.
        device: Where to; the CPU if left out.
        precision: ``fp32`` or ``bf16``, the type of the weights.

    Raises:
        InputError: The folder is not such a folder, is damaged, lacks weights, or holds another kind of model.
    """
    config = _read_config(folder)
    quiet("transformers")
    # transformers imports DeepSpeed where that is installed, which announces on standard output what it detects.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **offline)
    except Exception as error:
        text = f"{folder} has no tokenizer that can be read ({_first_line(error)}); copy its files there."
        raise InputError(text) from error
    pieces = folder / MODEL_FILE
    vocabulary = get_vocabulary(str(pieces)) if pieces.is_file() else vocabulary_of(tokenizer, str(folder))
    model = _load_weights(folder, with_head, offline)
    if precision == "bf16":
        _to_bf16(model)
    model = model.to(device=device or torch.device("cpu"))
    is_padding_free, first_position = _prepare(model, config, vocabulary.pad)
    num_positions = _num_positions(config, vocabulary.pad)
    longest = num_positions - vocabulary.num_boundary_tokens if num_positions else 0
    second_type = _second_type(tokenizer, config)
    return Encoder(model.eval(), vocabulary, longest, is_padding_free, first_position, second_type)


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 over the names and checksums of a folder's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model") and path.is_file():
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files of one model folder to another: ``save_pretrained`` of a model writes none."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder with a model that is known here."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no Hugging Face model folder (it has no config.json); name one, or make one of "
                         "a run with megaprot convert.")  # fmt: skip
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or names no model_type; restore it.") from error
    if name not in MODEL_TYPES:
        raise InputError(f"{folder} holds a model of the type {name}; known are {', '.join(MODEL_TYPES)}.")
    if config.get("is_decoder"):
        raise InputError(f"{folder} holds a decoder; name an encoder.")
    if config.get("position_embedding_type", "absolute") not in ("absolute", "rotary"):
        kind = config["position_embedding_type"]
        raise InputError(f"{folder} has positions of the kind {kind}; known are absolute and rotary.")
    return dict(config)


def _load_weights(folder: Path, with_head: bool, options: dict[str, Any]) -> Any:
    """Return transformers' masked-language model, or its encoder; refuse a folder that lacks any of its weights."""
    import transformers

    try:
        with _silent_loading():
            model, report = transformers.AutoModelForMaskedLM.from_pretrained(
                str(folder), output_loading_info=True, torch_dtype=torch.float32, **options
            )
    except Exception as error:
        raise InputError(
            f"the weights of {folder} cannot be loaded ({_first_line(error)}); restore them, as safetensors if they "
            "are pickled."
        ) from error
    is_rotary = getattr(model.config, "position_embedding_type", "") == "rotary"
    not_needed = (*_NOT_NEEDED, "position_embeddings") if is_rotary else _NOT_NEEDED  # 4.40 makes some in any case
    missing = [name for name in sorted(report["missing_keys"]) if not any(part in name for part in not_needed)]
    prefix = f"{model.base_model_prefix}."
    if not with_head:
        missing = [name for name in missing if name.startswith(prefix)]
    if missing:
        remedy = "score with a masked-language model" if not missing[0].startswith(prefix) else "restore it"
        raise InputError(f"{folder} lacks the weights {missing[0]}; {remedy}.")
    return model if with_head else model.base_model


@contextlib.contextmanager
def _silent_loading() -> Any:
    """Keep transformers' table of unexpected and missing weights off the terminal: what matters is checked here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _to_bf16(model: Any) -> None:
    """Round the weights to bf16; buffers, such as rotary frequencies, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _prepare(model: Any, config: dict[str, Any], pad: int) -> tuple[bool, int]:
    """Switch a model to padding-free attention where it can; return whether, and a sequence's first position.

    MegatronBert has no attention interface in any version of transformers, nor has any class before transformers 4.48;
    before version 5 ESM's rotary positions cannot be given.
    """
    import transformers

    absolute = config.get("position_embedding_type", "absolute") == "absolute"
    first_position = pad + 1 if config["model_type"] == "esm" and absolute else 0
    can = int(transformers.__version__.split(".")[0]) >= 5 and getattr(model, "_supports_attention_backend", False)
    if not can or not packed_attention.register():
        return False, first_position
    model.set_attn_implementation(packed_attention.PACKED)
    for number, layer in enumerate(model.base_model.encoder.layer):
        layer.attention.self.layer_idx = number  # ESM has none
    if config["model_type"] == "esm":
        from megaprot.finetune import esm

        esm.prepare(model.base_model)
    return True, first_position


def _num_positions(config: dict[str, Any], pad: int) -> int:
    """Return the most tokens of a sequence, 0 for rotary positions, which go on."""
    if config.get("position_embedding_type", "absolute") == "rotary":
        return 0
    num_positions = int(config["max_position_embeddings"])
    return num_positions - pad - 1 if config["model_type"] == "esm" else num_positions  # ESM counts from pad + 1


def _second_type(tokenizer: Any, config: dict[str, Any]) -> int:
    """Return the token type that a tokenizer gives the second of two sequences (BERT's: 1), if the model has types."""
    if config["model_type"] == "esm" or int(config.get("type_vocab_size", 2)) < 2:
        return 0
    return max(tokenizer("A", "A").get("token_type_ids", [0]))


def _first_line(error: Exception) -> str:
    """Return the beginning of a library's message, for a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160].rstrip(" .:;")
