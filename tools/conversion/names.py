"""The one table of tensor names: ProteinBert's (Megatron's) and those of transformers' masked-language models.

Megatron keeps query, key and value of a layer in one matrix, ordered by head; pads the vocabulary; and counts
positions from 0. ``EsmForMaskedLM`` counts them from the pad token's id plus one, so its table has that many rows more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model.protein_bert import padded_vocabulary_size
from megaprot.tools.conversion.tensor_source import TensorInfo, new_tensor

WORDS, POSITIONS, BIAS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight", "output_layer.bias"
_QKV = "self_attention.linear_qkv"
# ProteinBert's part of a layer: that of transformers' layers.
_ESM_LAYER = {
    "input_layernorm": "attention.LayerNorm",
    "self_attention.linear_proj": "attention.output.dense",
    "pre_mlp_layernorm": "LayerNorm",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
}
_PROJECTIONS = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))


@dataclass(frozen=True)
class Architecture:
    """The names of one class of transformers.

    Attributes:
        name: The class.
        model_type: Its word in ``config.json``.
        layer: Prefix of a layer, with the place of its number.
        layer_parts: ProteinBert's part of a layer: the class's.
        modules: The same for modules with weight and bias outside the layers.
        words: Token embedding.
        positions: Position embedding.
        bias: Bias of the tied decoder.
        tied: Copies of the token embedding and the bias that older files hold as well.
        shifts_positions: Positions start after the pad token's id.
    """

    name: str
    model_type: str
    layer: str
    layer_parts: Mapping[str, str]
    modules: Mapping[str, str]
    words: str
    positions: str
    bias: str
    tied: Mapping[str, str]
    shifts_positions: bool


ESM = Architecture(
    name="EsmForMaskedLM",
    model_type="esm",
    layer="esm.encoder.layer.{}",
    layer_parts=_ESM_LAYER,
    modules={
        "encoder.final_layernorm": "esm.encoder.emb_layer_norm_after",
        "lm_head.dense": "lm_head.dense",
        "lm_head.layer_norm": "lm_head.layer_norm",
    },
    words="esm.embeddings.word_embeddings.weight",
    positions="esm.embeddings.position_embeddings.weight",
    bias="lm_head.bias",
    tied={"lm_head.decoder.weight": WORDS, "lm_head.decoder.bias": BIAS},
    shifts_positions=True,
)
MEGATRON_BERT = Architecture(
    name="MegatronBertForMaskedLM",
    model_type="megatron-bert",
    layer="bert.encoder.layer.{}",
    layer_parts=_ESM_LAYER | {"input_layernorm": "attention.ln", "pre_mlp_layernorm": "ln"},
    modules={
        "encoder.final_layernorm": "bert.encoder.ln",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    },
    words="bert.embeddings.word_embeddings.weight",
    positions="bert.embeddings.position_embeddings.weight",
    bias="cls.predictions.bias",
    tied={"cls.predictions.decoder.weight": WORDS, "cls.predictions.decoder.bias": BIAS},
    shifts_positions=False,
)
ARCHITECTURES = {architecture.name: architecture for architecture in (ESM, MEGATRON_BERT)}


@dataclass(frozen=True)
class Rule:
    """One tensor of ProteinBert and the tensors it becomes: one, or three for the fused projection."""

    ours: str
    theirs: tuple[str, ...]


def rules(architecture: Architecture, model: ModelConfig) -> Iterator[Rule]:
    """Yield the rules of a model in the order of its layers."""
    yield Rule(WORDS, (architecture.words,))
    if model.position_embedding == "learned":
        yield Rule(POSITIONS, (architecture.positions,))
    for number in range(model.num_layers):
        here, there = f"encoder.layers.{number}", architecture.layer.format(number)
        for kind in ("weight", "bias"):
            yield Rule(f"{here}.{_QKV}.{kind}", tuple(f"{there}.{name}.{kind}" for name in _PROJECTIONS))
            for ours, theirs in architecture.layer_parts.items():
                yield Rule(f"{here}.{ours}.{kind}", (f"{there}.{theirs}.{kind}",))
    for ours, theirs in architecture.modules.items():
        for kind in ("weight", "bias"):
            yield Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",))
    yield Rule(BIAS, (architecture.bias,))


def our_shapes(model: ModelConfig, vocabulary: Vocabulary, num_positions: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a ProteinBert, by name."""
    hidden, wide, rows = model.hidden_size, model.feed_forward_size, padded_vocabulary_size(vocabulary)
    matrices = {
        _QKV: (3 * hidden, hidden),
        "self_attention.linear_proj": (hidden, hidden),
        "mlp.linear_fc1": (wide, hidden),
        "mlp.linear_fc2": (hidden, wide),
    }
    shapes: dict[str, tuple[int, ...]] = {WORDS: (rows, hidden), BIAS: (rows,)}
    if model.position_embedding == "learned":
        shapes[POSITIONS] = (num_positions, hidden)
    for number in range(model.num_layers):
        layer = f"encoder.layers.{number}"
        for part, shape in matrices.items():
            shapes |= {f"{layer}.{part}.weight": shape, f"{layer}.{part}.bias": shape[:1]}
        for part in ("input_layernorm", "pre_mlp_layernorm"):
            shapes |= {f"{layer}.{part}.weight": (hidden,), f"{layer}.{part}.bias": (hidden,)}
    for part in ("encoder.final_layernorm", "lm_head.layer_norm"):
        shapes |= {f"{part}.weight": (hidden,), f"{part}.bias": (hidden,)}
    return shapes | {"lm_head.dense.weight": (hidden, hidden), "lm_head.dense.bias": (hidden,)}


def position_shift(architecture: Architecture, vocabulary: Vocabulary) -> int:
    """Return the rows of the class's position table before that of position 0."""
    return vocabulary.pad + 1 if architecture.shifts_positions else 0


def their_shapes(rule: Rule, ours: Sequence[int], vocabulary_size: int, shift: int) -> list[tuple[int, ...]]:
    """Return the shapes of what a tensor of shape ``ours`` becomes."""
    first, *rest = ours
    if rule.ours in (WORDS, BIAS):
        return [(vocabulary_size, *rest)]
    if rule.ours == POSITIONS:
        return [(first + shift, *rest)]
    return [(first // len(rule.theirs), *rest)] * len(rule.theirs)


def split_qkv(fused: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return views [heads, head size, ...] of query, key and value in Megatron's fused weight or bias."""
    return tuple(fused.view(num_heads, 3, -1, *fused.shape[1:]).unbind(1))


def fuse_qkv(parts: Sequence[Callable[[], Tensor]], num_heads: int) -> Tensor:
    """Return Megatron's fused weight or bias of query, key and value, each asked for in its turn."""
    fused = torch.empty(0)
    for number, part in enumerate(parts):
        tensor = part()
        by_head = tensor.view(num_heads, -1, *tensor.shape[1:])
        if number == 0:
            shape = (num_heads, len(parts), *by_head.shape[1:])
            fused = new_tensor(TensorInfo(tensor.dtype, shape))
        # Not torch's own copy: its threads would spin while the bytes come from elsewhere.
        fused.view(torch.uint8).numpy()[:, number] = by_head.contiguous().view(torch.uint8).numpy()
    return fused.flatten(0, 2)
