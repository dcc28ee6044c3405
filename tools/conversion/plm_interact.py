"""Read PLM-interact's published weights (Liu et al. 2025): an ESM-2 inside a wrapper, and a head for pairs.

The wrapper's ``pytorch_model.bin`` or ``epoch_N.pt`` holds ``esm_mask.*``, an ``EsmForMaskedLM``, and ``classifier.*``,
a linear layer on the ReLU of the first token's last hidden state. The encoder's shape is read from the tensors.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically
from megaprot.finetune.config import HeadConfig, LabelConfig
from megaprot.finetune.model_folder import HEAD, TASK
from megaprot.finetune.tasks.ppi import Ppi
from megaprot.tools.conversion.hugging_face_reader import CONFIG, read_hugging_face
from megaprot.tools.conversion.names import ESM
from megaprot.tools.conversion.safetensors_files import write_file
from megaprot.tools.conversion.source_model import SourceModel
from megaprot.tools.conversion.tensor_source import TensorInfo
from megaprot.tools.conversion.torch_files import LoadedTensors, flat_tensors, load_plain

_FILE = "pytorch_model.bin"
_ENCODER, _HEAD = "esm_mask.", "classifier."


def is_folder(folder: Path) -> bool:
    """True for a folder with the wrapper's weights, whether or not a ``config.json`` lies beside them.

    Raises:
        InputError: The weights are damaged or hold more than plain values.
    """
    if not (folder / _FILE).is_file() or (folder / "model.safetensors").is_file():
        return False
    return not (folder / CONFIG).is_file() or any(
        name.startswith(_ENCODER) for name in flat_tensors(load_plain(folder / _FILE))
    )


def _esm_config(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Return ESM-2's ``config.json`` for the shapes of its tensors; the contact head has a weight a layer and head."""
    layers = {name.split(".")[3] for name in tensors if name.startswith("esm.encoder.layer.")} - {"*"}
    try:
        vocabulary_size, hidden_size = tensors[ESM.words].shape
        contact = tensors["esm.contact_head.regression.weight"]
        wide = tensors["esm.encoder.layer.0.intermediate.dense.weight"]
    except KeyError as error:
        raise InputError(f"{path} lacks {_ENCODER}{error.args[0]}; give PLM-interact's weights.") from error
    return {
        "architectures": [ESM.name],
        "model_type": ESM.model_type,
        "vocab_size": vocabulary_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": contact.shape[1] // len(layers),
        "intermediate_size": wide.shape[0],
        "max_position_embeddings": 1026,  # as every ESM-2 has; positions are rotary
        "position_embedding_type": "rotary",
        "layer_norm_eps": 1e-5,
        "token_dropout": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 1,
        "mask_token_id": 32,
    }


def read_plm_interact(given: Path) -> SourceModel:
    """Return the encoder of PLM-interact's weights, its pair head carried along.

    Args:
        given: ``epoch_N.pt`` or another file of ``torch.save``, or a folder with ``pytorch_model.bin``.

    Raises:
        InputError: The file is damaged, holds more than plain values, or is not PLM-interact's.
    """
    path = given / _FILE if given.is_dir() else given
    loaded = load_plain(path)
    held = loaded["model"] if isinstance(loaded, dict) and "model" in loaded else loaded
    found = {name.removeprefix("module."): tensor for name, tensor in flat_tensors(held).items()}
    encoder = {name.removeprefix(_ENCODER): part for name, part in found.items() if name.startswith(_ENCODER)}
    if not encoder:
        raise InputError(
            f"{path} holds no {_ENCODER}* tensors, so it is not PLM-interact's; of a Hugging Face model give the "
            "folder with its config.json."
        )
    source = read_hugging_face(path.parent, "esm", _esm_config(encoder, path), LoadedTensors(encoder))
    head = {name: part.clone() for name, part in found.items() if name.startswith(_HEAD)}
    return replace(source, pair_head=head, facts={"Weights": f"The encoder of PLM-interact's {path.name}."})


def write_pair_model(source: SourceModel, folder: Path) -> None:
    """Make a fine-tuned model of the task ``ppi`` of a folder with the encoder, where the source has a pair head.

    The head's tensors have the names of ``megaprot.finetune.pairs.heads.PlmInteractHead``. Without a validation split
    the threshold is a probability of one half.
    """
    if not source.pair_head:
        return
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in source.pair_head.items()}
    write_file(folder / HEAD, source.pair_head.items(), infos)
    task = Ppi(LabelConfig())
    description = {
        "task": task.name,
        "encoder": ".",
        "head": asdict(HeadConfig(name="plm-interact")),
        "labels": asdict(task.labels),
        "learned": task.state(),
    }
    write_json_atomically(folder / TASK, description)
