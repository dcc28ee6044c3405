"""Convert TAPE's transformer (Rao et al. 2019), such as ``bert-base``, to transformers' ``BertForMaskedLM``.

Both normalise after each block; TAPE's encoder has BERT's own names, its masked-language head others. Weights of its
fine-tuned models, or without the head's, become a ``BertModel``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically
from megaprot.common.vocabulary import get_vocabulary
from megaprot.tools.conversion.hugging_face_config import read_json
from megaprot.tools.conversion.hugging_face_reader import CONFIG, open_weights, with_present_names
from megaprot.tools.conversion.safetensors_files import write_model
from megaprot.tools.conversion.tensor_source import require_shapes
from megaprot.tools.conversion.tokenizer import write_tokenizer

_HEAD = {
    "mlm.transform.dense.weight": "cls.predictions.transform.dense.weight",
    "mlm.transform.dense.bias": "cls.predictions.transform.dense.bias",
    "mlm.transform.LayerNorm.weight": "cls.predictions.transform.LayerNorm.weight",
    "mlm.transform.LayerNorm.bias": "cls.predictions.transform.LayerNorm.bias",
    "mlm.bias": "cls.predictions.bias",
}
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")


def is_tape(config: dict[str, Any]) -> bool:
    """True for a ``config.json`` of TAPE's transformer: BERT's sizes without a ``model_type``."""
    return "model_type" not in config and {*_SIZES, "type_vocab_size"} <= set(config)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the encoder's tensors."""
    hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    rows = {"position": int(config["max_position_embeddings"]), "token_type": int(config["type_vocab_size"])}
    rows["word"] = get_vocabulary("iupac").size
    shapes: dict[str, tuple[int, ...]] = {
        f"bert.embeddings.{name}_embeddings.weight": (size, hidden) for name, size in rows.items()
    }
    linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (hidden, hidden)}
    linear |= {"intermediate.dense": (wide, hidden), "output.dense": (hidden, wide)}
    norms = ["bert.embeddings.LayerNorm"]
    for number in range(int(config["num_hidden_layers"])):
        layer = f"bert.encoder.layer.{number}"
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    return shapes | {f"{norm}.{kind}": (hidden,) for norm in norms for kind in ("weight", "bias")}


def convert_tape(given: Path, folder: Path, licence: str) -> str:
    """Write a folder that transformers loads, and return a line about it.

    Args:
        given: TAPE's folder: ``config.json`` and ``pytorch_model.bin``.
        folder: Where to.
        licence: Licence of the weights for the model card.

    Raises:
        InputError: A file is missing, damaged or holds more than tensors, or tensors do not fit the configuration.
    """
    config, vocabulary = read_json(given / CONFIG), get_vocabulary("iupac")
    weights = with_present_names(open_weights(given))
    try:
        shapes = _shapes(config)
        sizes = {name: int(config[name]) for name in (*_SIZES, "type_vocab_size")}
        shares = {name: float(config.get(name, 0.1)) for name in _PROBABILITIES}
        shares["layer_norm_eps"] = float(config.get("layer_norm_eps", 1e-12))
    except (TypeError, ValueError) as error:
        raise InputError(f"{given / CONFIG} garbles a value ({error}); restore it.") from error
    require_shapes(weights.infos, shapes, given)
    has_head = set(_HEAD) <= set(weights.infos)
    names = {name: name for name in weights.infos if name.startswith("bert.")} | (_HEAD if has_head else {})
    prefix = "" if has_head else "bert."
    infos = {theirs.removeprefix(prefix): weights.infos[ours] for ours, theirs in names.items()}
    write_model(folder, ((theirs.removeprefix(prefix), weights.read(ours)) for ours, theirs in names.items()), infos)
    architecture = "BertForMaskedLM" if has_head else "BertModel"
    written: dict[str, Any] = {
        **sizes,
        **shares,
        "architectures": [architecture],
        "model_type": "bert",
        "vocab_size": vocabulary.size,
        "hidden_act": str(config.get("hidden_act", "gelu")),
        "initializer_range": float(config.get("initializer_range", 0.02)),
        "pad_token_id": vocabulary.pad,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": False,
    }
    write_json_atomically(folder / CONFIG, written)
    write_tokenizer(vocabulary, folder, sizes["max_position_embeddings"])
    line = f"{architecture} of TAPE's weights" + ("" if has_head else ", which have no masked-language head")
    card = ["---", "library_name: transformers", f"license: {licence}", "tags:", "- protein", "---", ""]
    card += ["# TAPE transformer", "", f"{line}, names changed by Megaprot. Vocabulary: TAPE's IUPAC letters.", ""]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")
    return line
