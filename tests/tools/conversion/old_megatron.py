"""ProteinLM in plain torch, from its description, and its checkpoints as old versions of Megatron-LM wrote them.

Heads are looped over and nothing is fused: the weights of query, key and value are kept apart until they are saved.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NUM_LAYERS, HIDDEN, HEADS, WIDE, POSITIONS, VOCABULARY = 4, 32, 4, 64, 48, 31
EPSILON = 1e-12
Weights = dict[str, Tensor]


def random_weights(seed: int = 1) -> Weights:
    """Weights by names of this file's own: ``words``, ``positions``, ``0.query.weight``, ``head.dense.bias``, ..."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, 0.15, generator=generator)

    weights = {"words": draw(VOCABULARY, HIDDEN), "positions": draw(POSITIONS, HIDDEN), "head.bias": draw(VOCABULARY)}
    linear = {"query": (HIDDEN, HIDDEN), "key": (HIDDEN, HIDDEN), "value": (HIDDEN, HIDDEN), "dense": (HIDDEN, HIDDEN)}
    linear |= {"up": (WIDE, HIDDEN), "down": (HIDDEN, WIDE)}
    for layer in range(NUM_LAYERS):
        for name, shape in linear.items():
            weights |= {f"{layer}.{name}.weight": draw(*shape), f"{layer}.{name}.bias": draw(shape[0])}
    weights |= {"head.dense.weight": draw(HIDDEN, HIDDEN), "head.dense.bias": draw(HIDDEN)}
    norms = [f"{layer}.norm{number}" for layer in range(NUM_LAYERS) for number in (1, 2)]
    for norm in (*norms, "norm", "head.norm"):
        weights |= {f"{norm}.weight": draw(HIDDEN, mean=1.0), f"{norm}.bias": draw(HIDDEN)}
    return weights


def _norm(states: Tensor, weights: Weights, name: str) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(states: Tensor, weights: Weights, name: str) -> Tensor:
    return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _attention(states: Tensor, weights: Weights, layer: int) -> Tensor:
    size = HIDDEN // HEADS
    query, key, value = (_linear(states, weights, f"{layer}.{name}") for name in ("query", "key", "value"))
    heads = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / math.sqrt(size)
        heads.append(scores.softmax(-1) @ value[:, part])
    return torch.cat(heads, dim=1)


def _gelu(states: Tensor, kind: str) -> Tensor:
    if kind == "erf":
        return states * 0.5 * (1.0 + torch.erf(states / math.sqrt(2.0)))
    return 0.5 * states * (1.0 + torch.tanh(0.79788456 * states * (1.0 + 0.044715 * states * states)))


def forward(weights: Weights, tokens: Sequence[int], gelu: str = "tanh", head: str = "erf") -> tuple[Tensor, Tensor]:
    """Last hidden states [tokens, hidden] and logits [tokens, vocabulary] of one sequence."""
    states = weights["words"][list(tokens)] + weights["positions"][: len(tokens)]
    for layer in range(NUM_LAYERS):
        attended = _attention(_norm(states, weights, f"{layer}.norm1"), weights, layer)
        states = states + _linear(attended, weights, f"{layer}.dense")
        inner = _gelu(_linear(_norm(states, weights, f"{layer}.norm2"), weights, f"{layer}.up"), gelu)
        states = states + _linear(inner, weights, f"{layer}.down")
    hidden = _norm(states, weights, "norm")
    transformed = _norm(_gelu(_linear(hidden, weights, "head.dense"), head), weights, "head.norm")
    return hidden, functional.linear(transformed, weights["words"], weights["head.bias"])


def _fused(weights: Weights, layer: int, kind: str, heads: range, version: float) -> Tensor:
    """The fused projection of some heads, row by row in the order of a version."""
    size = HIDDEN // HEADS
    parts = [weights[f"{layer}.{name}.{kind}"] for name in ("query", "key", "value")]
    if version < 1.0:
        rows = [parts[part][head * size + row] for part in range(3) for head in heads for row in range(size)]
    elif version < 2.0:
        rows = [parts[part][head * size + row] for head in heads for row in range(size) for part in range(3)]
    else:
        rows = [parts[part][head * size + row] for head in heads for part in range(3) for row in range(size)]
    return torch.stack(rows)


def _layer(weights: Weights, layer: int, rank: int, ranks: int, version: float) -> Weights:
    heads = range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    found = {}
    for kind in ("weight", "bias"):
        rows = 1 if kind == "weight" else 0  # row-parallel biases are on every rank
        dense, down = weights[f"{layer}.dense.{kind}"], weights[f"{layer}.down.{kind}"]
        found |= {
            f"input_layernorm.{kind}": weights[f"{layer}.norm1.{kind}"],
            f"attention.query_key_value.{kind}": _fused(weights, layer, kind, heads, version),
            f"attention.dense.{kind}": dense.chunk(ranks, 1)[rank].clone() if rows else dense,
            f"post_attention_layernorm.{kind}": weights[f"{layer}.norm2.{kind}"],
            f"mlp.dense_h_to_4h.{kind}": weights[f"{layer}.up.{kind}"].chunk(ranks)[rank].clone(),
            f"mlp.dense_4h_to_h.{kind}": down.chunk(ranks, 1)[rank].clone() if rows else down,
        }
    return found


def save(
    weights: Weights,
    folder: Path,
    version: float,
    ranks: int = 1,
    stages: int = 1,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write an iteration folder; returns the folder above it. ``changes`` replace entries; a None leaves one out."""
    import numpy as np

    rows = 128 * ranks
    padded = {name: torch.full((rows, *weights[name].shape[1:]), 7.0) for name in ("words", "head.bias")}
    for name, table in padded.items():
        table[:VOCABULARY] = weights[name]
    arguments = {"num_layers": NUM_LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": WIDE}
    arguments |= {"max_position_embeddings": POSITIONS, "layernorm_epsilon": EPSILON, "bias_gelu_fusion": True}
    arguments |= {"openai_gelu": False, "tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    arguments |= {"params_dtype": torch.float32, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    arguments |= (changes or {}).get("args") or {}
    per_stage = NUM_LAYERS // stages
    for stage in range(stages):
        for rank in range(ranks):
            transformer = {
                f"layers.{number}.{name}": tensor
                for number in range(per_stage)
                for name, tensor in _layer(weights, stage * per_stage + number, rank, ranks, version).items()
            }
            model: dict[str, Any] = {"language_model": {"transformer": transformer}}
            if stage == 0:
                words = {"weight": padded["words"].chunk(ranks)[rank].clone()}
                positions = {"weight": weights["positions"]}
                model["language_model"]["embedding"] = {"word_embeddings": words, "position_embeddings": positions}
            if stage == stages - 1:
                transformer |= {f"final_layernorm.{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}
                names = {"dense": "dense", "layernorm": "norm"}
                model["lm_head"] = {"bias": padded["head.bias"].chunk(ranks)[rank].clone()} | {
                    f"{theirs}.{kind}": weights[f"head.{ours}.{kind}"]
                    for theirs, ours in names.items()
                    for kind in ("weight", "bias")
                }
            saved = {"args": Namespace(**arguments), "checkpoint_version": version, "iteration": 1000, "model": model}
            saved |= {"np_rng_state": np.random.RandomState(1).get_state(), "random_rng_state": (3, (1, 2), None)}
            saved |= {key: value for key, value in (changes or {}).items() if key != "args" or value is None}
            saved = {key: value for key, value in saved.items() if value is not None}
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            (folder / "iter_0001000" / name).mkdir(parents=True)
            torch.save(saved, folder / "iter_0001000" / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1000")
    return folder
