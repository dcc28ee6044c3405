"""ProteinBert with the weights of other libraries' models: the same logits, losses and gradients."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaprot.common.masking import KEPT, MASK_TOKEN
from megaprot.common.packing import PackedRow
from megaprot.common.vocabulary import Vocabulary, get_vocabulary
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.optimizer import build_optimizer
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.step import accumulate_gradients, evaluate_rows
from tests.pretrain.global_weights import load_global
from tests.pretrain.model.hf_weights import from_esm, from_fair_esm, from_megatron_bert
from tests.pretrain.model.oracles import (
    esm_for_masked_lm,
    hidden_states_alone,
    logits_alone,
    megatron_bert,
    randomise,
)
from tests.pretrain.tiny import ESM, batch_of, random_sequences, split_by_sequence, tiny_config

LENGTHS = (30, 3, 61, 17, 2)  # 15 places of padding in a row of 128
PROTEINLM = get_vocabulary("proteinlm")


def build(config: PretrainConfig, weights: dict[str, Tensor], place: Place, vocabulary: Vocabulary = ESM) -> Any:
    """Model chunk (wrapped for data parallelism) and the engine settings it was built with."""
    engine = transformer_config(config)
    chunk = build_model(config, engine, vocabulary, place)[0]
    load_global(chunk.module, weights)
    return chunk, engine


@torch.no_grad()
def packed_logits(
    chunk: Any,
    sequences: list[list[int]],
    pad: int,
    place: Place,
    row_tokens: int = 128,
    asked: Sequence[int] | None = None,
) -> Tensor:
    chunk.eval()
    return chunk(batch_of(sequences, row_tokens, pad, place.device, asked))


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_dropout", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_logits_equal_those_of_esm_for_masked_lm(alone: Place, positions: str, token_dropout: bool) -> None:
    config = tiny_config(model={"position_embedding": positions, "token_dropout": token_dropout})
    theirs = esm_for_masked_lm(config.model, config.data.max_sequence_length)
    chunk, _ = build(config, from_esm(theirs.state_dict(), 4), alone)
    sequences = random_sequences(LENGTHS, seed=1)
    logits = packed_logits(chunk, sequences, ESM.pad, alone)
    assert_equal(split_by_sequence(logits[:, : ESM.size], sequences), logits_alone(theirs, sequences))


def test_logits_equal_those_of_a_padded_batch_of_esm_for_masked_lm(alone: Place) -> None:
    config = tiny_config(model={"token_dropout": True})
    theirs = esm_for_masked_lm(config.model, config.data.max_sequence_length)
    chunk, _ = build(config, from_esm(theirs.state_dict(), 4), alone)
    sequences = random_sequences(LENGTHS, seed=2)
    batch = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=ESM.pad
    )
    with torch.no_grad():
        padded = theirs(input_ids=batch, attention_mask=(batch != ESM.pad).long()).logits
    logits = packed_logits(chunk, sequences, ESM.pad, alone)
    expected = [row[:length] for row, length in zip(padded, LENGTHS, strict=True)]
    assert_equal(split_by_sequence(logits[:, : ESM.size], sequences), expected)


def hidden_states(ours: str, theirs: str, place: Place) -> tuple[list[Tensor], list[Tensor]]:
    """Last hidden states by sequence, of ProteinBert with activation ``ours`` and of MegatronBert with ``theirs``."""
    config = tiny_config(model={"position_embedding": "learned", "activation": ours})
    oracle = megatron_bert(config.model, config.data.max_sequence_length, PROTEINLM.size, theirs)
    chunk, _ = build(config, from_megatron_bert(oracle.state_dict(), 4), place, PROTEINLM)
    hidden: list[Tensor] = []
    chunk.module.encoder.register_forward_hook(lambda module, arguments, output: hidden.append(output[:, 0]))
    sequences = random_sequences(LENGTHS, seed=4, vocabulary=PROTEINLM)
    packed_logits(chunk, sequences, PROTEINLM.pad, place)
    return split_by_sequence(hidden[0], sequences), hidden_states_alone(oracle, sequences)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_hidden_states_equal_those_of_megatron_bert(alone: Place, activation: str) -> None:
    assert_equal(*hidden_states("gelu_tanh", activation, alone))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu_erf", "gelu_new"), ("gelu_tanh", "gelu")])
def test_the_two_activations_are_told_apart_at_this_tolerance(alone: Place, ours: str, theirs: str) -> None:
    for mine, other in zip(*hidden_states(ours, theirs, alone), strict=True):
        assert float((mine - other).abs().max()) > 1e-4


@pytest.mark.parametrize("token_dropout", [False, True])
def test_logits_equal_those_of_fair_esm(alone: Place, token_dropout: bool) -> None:
    esm2 = pytest.importorskip("esm.model.esm2")
    theirs = esm2.ESM2(num_layers=4, embed_dim=64, attention_heads=4, token_dropout=token_dropout).eval()
    assert tuple(theirs.alphabet.all_toks) == ESM.tokens
    randomise(theirs, seed=5)
    config = tiny_config(model={"token_dropout": token_dropout})
    chunk, _ = build(config, from_fair_esm(theirs.state_dict(), 4), alone)
    sequences = random_sequences(LENGTHS, seed=5)
    logits = packed_logits(chunk, sequences, ESM.pad, alone)
    with torch.no_grad():
        expected = [theirs(torch.tensor([sequence]))["logits"][0] for sequence in sequences]
    assert_equal(split_by_sequence(logits[:, : ESM.size], sequences), expected)


def test_logits_beyond_the_vocabulary_are_minus_infinity(alone: Place) -> None:
    config = tiny_config()
    theirs = esm_for_masked_lm(config.model, config.data.max_sequence_length)
    chunk, _ = build(config, from_esm(theirs.state_dict(), 4), alone)
    logits = packed_logits(chunk, random_sequences(LENGTHS, seed=6), ESM.pad, alone)
    assert logits.dtype == torch.float32
    assert logits.shape == (128, 128)
    assert bool(torch.isneginf(logits[:, ESM.size :]).all())
    assert bool(torch.isfinite(logits[:, : ESM.size]).all())


def packed_row(sequences: list[list[int]], row_tokens: int, capacity: int, seed: int) -> PackedRow:
    """A row whose mask tokens, and some residues shown as they are, are to be predicted; places of no use follow."""
    generator = np.random.default_rng(seed)
    batch = batch_of(sequences, row_tokens, ESM.pad, torch.device("cpu"))
    tokens = batch.tokens.numpy()
    masked = np.flatnonzero(tokens == ESM.mask)
    kept = generator.choice(np.flatnonzero(np.isin(tokens, ESM.replacements)), 4, replace=False)
    places = np.sort(np.concatenate((masked, kept)))
    unused = capacity - len(places)
    labels = np.where(tokens[places] == ESM.mask, generator.choice(ESM.replacements, len(places)), tokens[places])
    kinds = np.where(tokens[places] == ESM.mask, MASK_TOKEN, KEPT)
    return PackedRow(
        tokens=tokens,
        positions=batch.positions.numpy(),
        cu_seqlens=batch.cu_seqlens.numpy(),
        num_sequences=len(sequences),
        masked_positions=np.pad(places, (0, unused), constant_values=row_tokens - 1),
        labels=np.pad(labels, (0, unused), constant_values=ESM.pad),
        masked_kind=np.pad(kinds, (0, unused)).astype(np.uint8),
        num_residues=0,
    )


def sums_of(theirs: Any, rows: list[PackedRow], batches: list[list[list[int]]]) -> dict[str, Any]:
    """Summed loss (with its graph), correct predictions and counts, over all positions and over mask tokens alone."""
    found = {"loss": torch.zeros(()), "count": 0, "correct": 0, "mask_loss": torch.zeros(()), "mask_count": 0}
    for row, sequences in zip(rows, batches, strict=True):
        logits = torch.cat([theirs(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences])
        for place, label, kind in zip(row.masked_positions, row.labels, row.masked_kind, strict=True):
            if kind == 0:
                continue
            loss = torch.nn.functional.cross_entropy(logits[place][None], torch.tensor([int(label)]))
            found["loss"] = found["loss"] + loss
            found["count"] += 1
            found["correct"] += int(logits[place].argmax() == label)
            if kind == MASK_TOKEN:
                found["mask_loss"] = found["mask_loss"] + loss.detach()
                found["mask_count"] += 1
    return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_sums_and_every_gradient_of_a_step_equal_those_of_autograd_through_esm(alone: Place, recompute: str) -> None:
    config = tiny_config(train={"recompute": recompute})
    theirs = esm_for_masked_lm(config.model, config.data.max_sequence_length)
    chunk, engine = build(config, from_esm(theirs.state_dict(), 4), alone)
    optimizer = build_optimizer(config.optim, config.train, config.parallel, [chunk])
    engine.grad_scale_func = optimizer.scale_loss
    batches = [random_sequences(lengths, seed) for seed, lengths in enumerate((LENGTHS, (70, 58), (40,)))]
    rows = [packed_row(sequences, 128, 64, seed) for seed, sequences in enumerate(batches)]

    sums = sums_of(theirs, rows, batches)
    (sums["loss"] / sums["count"]).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    expected = from_esm(gradients, 4, filler=0.0)

    evaluated = evaluate_rows([chunk], rows, alone)
    result = accumulate_gradients([chunk], optimizer, rows, alone)
    for name, value in sums.items():
        assert getattr(evaluated, name) == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-5), name
    assert result.tally == evaluated
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, parameter in chunk.module.named_parameters():
        difference = (parameter.main_grad.cpu() - expected[name]).norm() / expected[name].norm().clamp(min=1e-3 * norm)
        assert float(difference) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("token_dropout", [False, True])
def test_bf16_varlen_logits_are_close_to_those_of_esm_for_masked_lm(alone: Place, token_dropout: bool) -> None:
    config = tiny_config(
        model={"attention_backend": "varlen", "token_dropout": token_dropout}, train={"precision": "bf16"}
    )
    theirs = esm_for_masked_lm(config.model, config.data.max_sequence_length)
    chunk, _ = build(config, from_esm(theirs.state_dict(), 4), alone)
    sequences = random_sequences(LENGTHS, seed=1)
    logits = packed_logits(chunk, sequences, ESM.pad, alone)
    expected = logits_alone(theirs, sequences)
    for mine, other in zip(split_by_sequence(logits[:, : ESM.size], sequences), expected, strict=True):
        assert mine.dtype == torch.float32
        # Eight bits of mantissa through four layers: a few per cent of the spread of the logits.
        assert float((mine - other).norm() / other.norm()) < 0.05


# Where few tokens attend in the last layer: none of the first sequence, one thrice, as unused places of a row are.
SOME_PLACES = (*range(LENGTHS[0], LENGTHS[0] + 20, 4), *range(60, 100, 3), 127, 127, 127)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_where_they_are_asked_for_are_those_of_all_places(alone: Place, precision: str) -> None:
    theirs = esm_for_masked_lm(tiny_config().model, 80)
    chunk, _ = build(tiny_config(train={"precision": precision}), from_esm(theirs.state_dict(), 4), alone)
    sequences = random_sequences(LENGTHS, seed=1)
    all_places = packed_logits(chunk, sequences, ESM.pad, alone)[:, : ESM.size]
    some = packed_logits(chunk, sequences, ESM.pad, alone, asked=SOME_PLACES)[:, : ESM.size]
    tolerance = 1e-5 if precision == "fp32" else 0.02
    assert float((some - all_places[list(SOME_PLACES)]).norm() / some.norm()) < tolerance


FUSED_KERNELS = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is for the CPU")),
    pytest.param("varlen", marks=pytest.mark.gpu),
    pytest.param("te", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("asked", [None, SOME_PLACES], ids=["all places", "some places"])
@pytest.mark.parametrize("backend", FUSED_KERNELS)
def test_fused_attention_agrees_with_sdpa_in_bf16(alone: Place, backend: str, asked: tuple[int, ...] | None) -> None:
    if backend == "te":
        pytest.importorskip("transformer_engine.pytorch")
    theirs = esm_for_masked_lm(tiny_config().model, 80)
    sequences = random_sequences(LENGTHS, seed=1)
    found = []
    for name in (backend, "sdpa"):
        config = tiny_config(model={"attention_backend": name}, train={"precision": "bf16"})
        chunk, _ = build(config, from_esm(theirs.state_dict(), 4), alone)
        logits = packed_logits(chunk, sequences, ESM.pad, alone, asked=asked)[:, : ESM.size]
        found.append(torch.cat(split_by_sequence(logits, sequences)) if asked is None else logits)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.03


@pytest.mark.parametrize("backend", FUSED_KERNELS)
def test_gradients_agree_with_those_under_sdpa_where_segments_have_no_or_few_queries(
    alone: Place, backend: str
) -> None:
    if backend == "te":
        pytest.importorskip("transformer_engine.pytorch")
    theirs = esm_for_masked_lm(tiny_config().model, 80)
    batch = batch_of(random_sequences(LENGTHS, seed=1), 128, ESM.pad, alone.device, SOME_PLACES)
    found = []
    for name in (backend, "sdpa"):
        config = tiny_config(model={"attention_backend": name}, train={"precision": "bf16"})
        chunk, _ = build(config, from_esm(theirs.state_dict(), 4), alone)
        chunk.zero_grad_buffer()
        chunk(batch)[:, : ESM.size].square().mean().backward()
        found.append({name: parameter.main_grad for name, parameter in chunk.module.named_parameters()})
    whole = torch.cat([gradient.flatten() for gradient in found[1].values()]).norm()
    for name, expected in found[1].items():
        difference = (found[0][name] - expected).norm() / expected.norm().clamp(min=1e-2 * whole)
        assert float(difference) < 0.05, name
