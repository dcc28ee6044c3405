"""A model as every reader hands it to every writer: weights under ProteinBert's names, and what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import ModelConfig
from megaprot.tools.conversion.tensor_source import TensorSource

CARRIED = "carried.safetensors"


@dataclass(frozen=True)
class SourceModel:
    """What is being converted.

    Attributes:
        tensors: Weights by ProteinBert's global names, the vocabulary padded to a multiple of 128.
        model: Shape and variant.
        num_positions: Longest sequence in tokens; rows of learned positions.
        vocabulary: Tokens.
        architecture: transformers' class it came from; empty where it was no such class.
        carried: Tensors of that class that ProteinBert has no place for, by the class's names.
        pair_head: Tensors of a head for pairs of proteins (PLM-interact's), by its names.
        tanh_head: The LM head has tanh GELU as well, instead of erf as Megatron's has.
        facts: What the model card says of it: {heading: text}.
        sizes: Numbers the card's first table lists, such as steps.
    """

    tensors: TensorSource
    model: ModelConfig
    num_positions: int
    vocabulary: Vocabulary
    architecture: str = ""
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    pair_head: Mapping[str, Tensor] = field(default_factory=dict)
    tanh_head: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
