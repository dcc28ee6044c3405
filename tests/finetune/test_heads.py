"""Heads: TAPE's own against tape-proteins with the same weights; ours see nothing of their neighbours in the row."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.batch import Batch, pack
from megaprot.finetune.heads import AttentionPooling, MeanPooling, protein_head, residue_head

SIZE = 24
LENGTHS = (9, 4, 9, 1)


def batch_of(*lengths: int) -> Batch:
    random = np.random.default_rng(0)
    return pack(get_vocabulary("esm"), [random.integers(4, 24, length) for length in lengths])


def states_of(batch: Batch) -> torch.Tensor:
    return torch.randn(len(batch.tokens), SIZE, generator=torch.Generator().manual_seed(1))


def alone(batch: Batch, states: torch.Tensor) -> list[tuple[Batch, torch.Tensor]]:
    """Each protein in a row of its own."""
    parts = states.split(batch.lengths)
    return [(batch_of(length - 2), part) for length, part in zip(batch.lengths, parts, strict=True)]


def tape() -> Any:
    return pytest.importorskip("tape.models.modeling_utils")


def give_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy TAPE's weights to a head of ours: both hold a norm and a direction of each whole weight, in this order."""
    state = theirs.state_dict()
    values = {}
    for name in ours.state_dict():
        values[name] = {
            "original0": lambda stem: state[f"{stem}.weight_g"],
            "original1": lambda stem: state[f"{stem}.weight_v"],
        }.get(name.rsplit(".", 1)[-1], lambda stem: state[stem])(their_name(name))
    ours.load_state_dict({name: value.reshape(ours.state_dict()[name].shape) for name, value in values.items()})


def their_name(name: str) -> str:
    """`layers.0.parametrizations.weight.original0` -> `main.0`, `first.bias` -> `main.1.bias`."""
    stem = name.split(".parametrizations")[0]
    places = {"layers.0": "main.0", "layers.2": "main.3", "norm": "main.0", "first": "main.1", "second": "main.4"}
    for ours, theirs in places.items():
        if stem == ours or stem.startswith(f"{ours}."):
            return theirs + stem[len(ours) :]
    raise AssertionError(name)


@pytest.mark.parametrize("num_outputs", [1, 7])
def test_tapes_protein_head_equals_tapes(num_outputs: int) -> None:
    theirs = tape().SimpleMLP(SIZE, 512, num_outputs)
    ours = protein_head("tape", SIZE, 99, num_outputs, 0.3).eval()
    renamed = nn.Module()
    renamed.layers = ours.layers
    give_weights(renamed, theirs)
    batch = batch_of(*LENGTHS)
    states = states_of(batch)
    pooled = torch.tanh(nn.functional.linear(batch.first(states), ours.pooling.dense.weight, ours.pooling.dense.bias))
    assert torch.allclose(ours(batch, states), theirs(pooled), atol=1e-6)
    assert states[0].equal(batch.first(states)[0])  # the first token is what TAPE's pooler reads


@pytest.mark.parametrize("training", [False, True])
def test_tapes_residue_head_equals_tapes_for_proteins_of_one_length(training: bool) -> None:
    theirs = tape().SimpleConv(SIZE, 512, 8).train(training)
    theirs.main[0].running_mean.normal_()
    theirs.main[0].running_var.uniform_(0.5, 2.0)
    ours = residue_head("tape", SIZE, 99, 8, 0.3).train(training)
    give_weights(ours, theirs)
    batch = batch_of(9, 9, 9)
    states = states_of(batch)
    expected = theirs(states.view(3, 11, SIZE))[:, 1:-1].flatten(0, 1)
    assert torch.allclose(ours(batch, states), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["tape", "convolution", "mlp"])
def test_residue_heads_give_each_protein_what_it_has_alone(name: str) -> None:
    head = residue_head(name, SIZE, 16, 3, 0.3).eval()
    batch = batch_of(*LENGTHS)
    states = states_of(batch)
    expected = torch.cat([head(one, part) for one, part in alone(batch, states)])
    found = head(batch, states)
    assert found.shape == (sum(LENGTHS), 3)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["tape", "mean", "attention"])
def test_protein_heads_give_each_protein_what_it_has_alone(name: str) -> None:
    head = protein_head(name, SIZE, 16, 3, 0.3).eval()
    for parameter in head.parameters():  # the attention begins as a plain mean: make it choose
        nn.init.normal_(parameter)
    batch = batch_of(*LENGTHS)
    states = states_of(batch)
    expected = torch.cat([head(one, part) for one, part in alone(batch, states)])
    assert torch.allclose(head(batch, states), expected, atol=1e-5)


def test_pooling_is_a_naive_loop_over_residues_alone() -> None:
    batch = batch_of(*LENGTHS)
    states = states_of(batch)
    attention = AttentionPooling(SIZE)
    assert torch.allclose(attention(batch, states), MeanPooling()(batch, states), atol=1e-6)
    nn.init.normal_(attention.score.weight, std=30.0)  # large scores: no overflow
    for found, part in zip(attention(batch, states), states.split(batch.lengths), strict=True):
        residues = part[1:-1]
        weights = (residues @ attention.score.weight[0]).softmax(dim=0)
        assert torch.allclose(found, weights @ residues, atol=1e-5)


@pytest.mark.parametrize("name", ["tape", "mean", "attention"])
def test_dropout_of_our_heads_is_on_in_training_alone(name: str) -> None:
    head = protein_head(name, SIZE, 64, 3, 0.5)
    batch = batch_of(*LENGTHS)
    states = states_of(batch)
    assert torch.equal(head.eval()(batch, states), head(batch, states))
    differs = not torch.equal(head.train()(batch, states), head(batch, states))
    assert differs == (name != "tape")  # TAPE's has none
