"""Sequences of one row never see each other: packed equals alone, and a change in one changes nothing in the others."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.parallel import Place
from tests.pretrain.model.oracles import randomise
from tests.pretrain.tiny import ESM, batch_of, random_sequences, split_by_sequence, tiny_config

ROW_TOKENS = 96
VARIANTS = [(positions, dropout) for positions in ("rotary", "learned") for dropout in (False, True)]
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) <= ROW_TOKENS)


@cache
def model_of(place: Place, positions: str, token_dropout: bool) -> Any:
    config = tiny_config(model={"num_layers": 2, "position_embedding": positions, "token_dropout": token_dropout})
    module = build_model(config, transformer_config(config), ESM, place)[0].module
    randomise(module, seed=9)
    return module.eval()


@torch.no_grad()
def logits_by_sequence(model: Any, sequences: list[list[int]], row_tokens: int, place: Place) -> list[Tensor]:
    logits = model(batch_of(sequences, row_tokens, ESM.pad, place.device))
    return split_by_sequence(logits[:, : ESM.size], sequences)


@pytest.mark.parametrize(("positions", "token_dropout"), VARIANTS)
@settings(max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31))
def test_packed_logits_equal_those_of_each_sequence_alone(
    alone: Place, positions: str, token_dropout: bool, lengths: list[int], seed: int
) -> None:
    model = model_of(alone, positions, token_dropout)
    sequences = random_sequences(lengths, seed)
    packed = logits_by_sequence(model, sequences, ROW_TOKENS, alone)
    for sequence, logits in zip(sequences, packed, strict=True):
        by_itself = logits_by_sequence(model, [sequence], len(sequence), alone)[0]
        torch.testing.assert_close(logits, by_itself, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "token_dropout"), VARIANTS)
@settings(max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31), data=st.data())
def test_changing_a_residue_changes_no_other_sequence_at_all(
    alone: Place, positions: str, token_dropout: bool, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    model = model_of(alone, positions, token_dropout)
    sequences = random_sequences(lengths, seed)
    changed = data.draw(st.integers(0, len(sequences) - 1), label="sequence")
    place = data.draw(st.integers(0, lengths[changed] - 1), label="place")
    before = sequences[changed][place]
    token = data.draw(st.sampled_from([*ESM.replacements, ESM.mask]).filter(lambda new: new != before))
    after = [list(sequence) for sequence in sequences]
    after[changed][place] = token
    old = logits_by_sequence(model, sequences, ROW_TOKENS, alone)
    new = logits_by_sequence(model, after, ROW_TOKENS, alone)
    for number, (one, other) in enumerate(zip(old, new, strict=True)):
        assert torch.equal(one, other) == (number != changed)


@pytest.mark.parametrize(("positions", "token_dropout"), VARIANTS)
def test_what_stands_in_the_padding_changes_nothing(alone: Place, positions: str, token_dropout: bool) -> None:
    model = model_of(alone, positions, token_dropout)
    sequences = random_sequences([30, 20], seed=3)
    batch = batch_of(sequences, ROW_TOKENS, ESM.pad, alone.device)
    with torch.no_grad():
        clean = model(batch)[:50]
        batch.tokens[50:] = ESM.mask
        dirty = model(batch)[:50]
    assert torch.equal(clean, dirty)


def test_a_row_of_padding_alone_gives_finite_logits(alone: Place) -> None:
    for positions, token_dropout in VARIANTS:
        logits = model_of(alone, positions, token_dropout)(batch_of([], ROW_TOKENS, ESM.pad, alone.device))
        assert bool(torch.isfinite(logits[:, : ESM.size]).all())


def test_a_row_of_mask_tokens_alone_gives_finite_logits_under_token_dropout(alone: Place) -> None:
    model = model_of(alone, "rotary", True)
    logits = model(batch_of([[ESM.mask] * ROW_TOKENS], ROW_TOKENS, ESM.pad, alone.device))
    assert bool(torch.isfinite(logits[:, : ESM.size]).all())
