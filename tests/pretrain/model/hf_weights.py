"""The weights of other libraries' models under ProteinBert's global names, written from the architectures alone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.pretrain.tiny import PADDED_SIZE

# ProteinBert's part of a layer: the same part of a layer there.
_ESM_LAYER = {
    "input_layernorm": "attention.LayerNorm",
    "self_attention.linear_proj": "attention.output.dense",
    "pre_mlp_layernorm": "LayerNorm",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
}
_MEGATRON_BERT_LAYER = _ESM_LAYER | {"input_layernorm": "attention.ln", "pre_mlp_layernorm": "ln"}
_FAIR_ESM_LAYER = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "final_layer_norm",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc2": "fc2",
}
_SELF = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
_FAIR_SELF = tuple(f"self_attn.{name}_proj" for name in "qkv")


def fused_qkv(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Megatron's fused projection: the rows of head 0's query, key and value, then head 1's, ..."""
    by_head = [part.chunk(num_heads) for part in (query, key, value)]
    return torch.cat([part[head] for head in range(num_heads) for part in by_head])


def padded(by_token: Tensor, filler: float) -> Tensor:
    """``by_token`` with rows of ``filler`` up to the padded vocabulary."""
    rest = by_token.new_full((PADDED_SIZE - by_token.shape[0], *by_token.shape[1:]), filler)
    return torch.cat((by_token, rest))


def _layers(
    theirs: Mapping[str, Tensor], prefix: str, names: Mapping[str, str], projections: tuple[str, ...], num_heads: int
) -> dict[str, Tensor]:
    found = {}
    number = 0
    while f"{prefix}.{number}.{projections[0]}.weight" in theirs:
        here, there = f"encoder.layers.{number}", f"{prefix}.{number}"
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{there}.{projection}.{kind}"] for projection in projections]
            found[f"{here}.self_attention.linear_qkv.{kind}"] = fused_qkv(*qkv, num_heads=num_heads)
            for ours, name in names.items():
                found[f"{here}.{ours}.{kind}"] = theirs[f"{there}.{name}.{kind}"]
        number += 1
    return found


def _renamed(theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for ours, name in names.items() for kind in ("weight", "bias")}


def from_esm(theirs: Mapping[str, Tensor], num_heads: int, filler: float = 7.0) -> dict[str, Tensor]:
    """transformers' ``EsmForMaskedLM``, rotary or absolute (whose rows up to the pad token's are never looked up)."""
    head = {"lm_head.dense": "lm_head.dense", "lm_head.layer_norm": "lm_head.layer_norm"}
    found = _layers(theirs, "esm.encoder.layer", _ESM_LAYER, _SELF, num_heads)
    found |= _renamed(theirs, head | {"encoder.final_layernorm": "esm.encoder.emb_layer_norm_after"})
    found["embedding.word_embeddings.weight"] = padded(theirs["esm.embeddings.word_embeddings.weight"], filler)
    found["output_layer.bias"] = padded(theirs["lm_head.bias"], filler)
    positions = theirs.get("esm.embeddings.position_embeddings.weight")
    if positions is not None:
        found["embedding.position_embeddings.weight"] = positions[2:]
    return found


def from_megatron_bert(theirs: Mapping[str, Tensor], num_heads: int, filler: float = 7.0) -> dict[str, Tensor]:
    """transformers' ``MegatronBertForMaskedLM``."""
    head = {
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    }
    found = _layers(theirs, "bert.encoder.layer", _MEGATRON_BERT_LAYER, _SELF, num_heads)
    found |= _renamed(theirs, head | {"encoder.final_layernorm": "bert.encoder.ln"})
    found["embedding.word_embeddings.weight"] = padded(theirs["bert.embeddings.word_embeddings.weight"], filler)
    found["embedding.position_embeddings.weight"] = theirs["bert.embeddings.position_embeddings.weight"]
    found["output_layer.bias"] = padded(theirs["cls.predictions.bias"], filler)
    return found


def from_fair_esm(theirs: Mapping[str, Tensor], num_heads: int, filler: float = 7.0) -> dict[str, Tensor]:
    """fair-esm's ``ESM2``."""
    head = {"lm_head.dense": "lm_head.dense", "lm_head.layer_norm": "lm_head.layer_norm"}
    found = _layers(theirs, "layers", _FAIR_ESM_LAYER, _FAIR_SELF, num_heads)
    found |= _renamed(theirs, head | {"encoder.final_layernorm": "emb_layer_norm_after"})
    found["embedding.word_embeddings.weight"] = padded(theirs["embed_tokens.weight"], filler)
    found["output_layer.bias"] = padded(theirs["lm_head.bias"], filler)
    return found
