"""The padding-free encoder against transformers one sequence at a time, and against fair-esm."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megaprot.finetune.batch import Batch, pack
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.hugging_face import copy_tokenizer, load_encoder
from tests.finetune.folders import (
    alone,
    bert_folder,
    esm_folder,
    hidden_alone,
    megatron_bert_folder,
    random_proteins,
    residue_ids,
)
from tests.tools.conversion.models import fair_esm_of

KINDS: dict[str, Callable[[Path], Path]] = {
    "esm": esm_folder,
    "esm_absolute": lambda folder: esm_folder(
        folder, position_embedding_type="absolute", emb_layer_norm_before=True, token_dropout=False
    ),
    "bert": bert_folder,
    "megatron_bert": megatron_bert_folder,
}
PROTEINS = random_proteins([30, 30, 7, 1, 50, 30])


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return esm_folder(tmp_path_factory.mktemp("model") / "esm")


def row(encoder: Encoder, proteins: list[bytes] = PROTEINS) -> Batch:
    return pack(encoder.vocabulary, residue_ids(encoder, proteins))


def largest_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def test_hidden_states_of_all_layers_are_those_of_each_sequence_alone(folder: Path) -> None:
    encoder = load_encoder(folder)
    assert encoder.is_padding_free == (folder.name != "megatron_bert")
    batch = row(encoder)
    layers = [0, 1, 2, 3, -1, -2, -4]
    with torch.no_grad():
        found = encoder(batch, layers)
        last = encoder(batch)
    assert torch.equal(last[0], found[4])
    for number, protein in enumerate(PROTEINS):
        expected = hidden_alone(folder, protein.decode(), with_spaces=folder.name == "bert")
        window = slice(int(batch.cu_seqlens[number]), int(batch.cu_seqlens[number + 1]))
        for layer, states in zip(layers, found, strict=True):
            assert largest_difference(states[window], expected[layer]) < 1e-5, (number, layer)


def test_logits_of_masked_sequences_are_those_of_each_alone(folder: Path) -> None:
    encoder = load_encoder(folder, with_head=True)
    batch = row(encoder)
    masks = {0: [3, 4, 5], 1: [], 4: [*range(0, 50, 2)], 5: [29]}  # token dropout scales each sequence by its own
    tokens = batch.tokens.clone()
    for number, places in masks.items():
        tokens[[int(batch.cu_seqlens[number]) + 1 + place for place in places]] = encoder.vocabulary.mask
    with torch.no_grad():
        logits = encoder.logits(encoder(replace(batch, tokens=tokens))[0])
    for number, places in masks.items():
        text = PROTEINS[number].decode()
        expected = alone(folder, text, with_spaces=folder.name == "bert", mask=places).logits[0]
        window = slice(int(batch.cu_seqlens[number]), int(batch.cu_seqlens[number + 1]))
        assert largest_difference(logits[window], expected) < 2e-5


def test_logits_are_those_of_fair_esm(esm: Path) -> None:
    from transformers import EsmForMaskedLM

    folder = esm.parent / "wide"  # fair-esm's feed-forward layer is four times as wide as its hidden states
    esm_folder(folder, intermediate_size=128)
    encoder = load_encoder(folder, with_head=True)
    fair = fair_esm_of(EsmForMaskedLM.from_pretrained(folder))
    batch = row(encoder)
    tokens = torch.where(torch.arange(len(batch.tokens)) % 7 == 3, encoder.vocabulary.mask, batch.tokens)
    tokens = torch.where(batch.is_residue, tokens, batch.tokens)
    with torch.no_grad():
        logits = encoder.logits(encoder(replace(batch, tokens=tokens))[0])
        for found, sequence in zip(logits.split(batch.lengths), tokens.split(batch.lengths), strict=True):
            assert largest_difference(found, fair(sequence[None])["logits"][0]) < 2e-5


def test_attention_maps_are_told_layer_by_layer(folder: Path) -> None:
    encoder = load_encoder(folder)
    batch = row(encoder)
    told: dict[tuple[int, int], Tensor] = {}

    def on_attention(layer: int, first: int, maps: Tensor) -> None:
        for number, one in enumerate(maps, start=first):
            assert (layer, number) not in told
            told[layer, number] = one

    with torch.no_grad():
        states = encoder(batch, on_attention=on_attention)[0]
        assert largest_difference(states, encoder(batch)[0]) < 1e-5
    assert set(told) == {(layer, number) for layer in range(3) for number in range(len(PROTEINS))}
    for number, protein in enumerate(PROTEINS):
        spaces = folder.name == "bert"
        expected = alone(folder, protein.decode(), spaces, output_attentions=True).attentions
        for layer in range(3):
            assert largest_difference(told[layer, number], expected[layer][0]) < 1e-5


def test_gradients_are_the_sum_of_those_of_each_sequence_alone(folder: Path) -> None:
    from transformers import AutoModelForMaskedLM

    encoder = load_encoder(folder, with_head=True)
    batch = row(encoder)
    encoder.logits(encoder(batch)[0]).square().sum().backward()
    theirs = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    for tokens in batch.tokens.split(batch.lengths):
        theirs(tokens[None]).logits.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in encoder.model.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None and expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-2, msg=name)


@pytest.mark.parametrize("wanted", ["hidden", "attention"])
def test_dropout_acts_in_training_only(wanted: str, tmp_path: Path) -> None:
    rates = {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"}
    none = dict.fromkeys(rates.values(), 0.0)
    encoder = load_encoder(bert_folder(tmp_path / "bert", **none | {rates[wanted]: 0.5}))
    batch = row(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(batch)[0], encoder(batch)[0])
        encoder.train()
        assert not torch.equal(encoder(batch)[0], encoder(batch)[0])
        mapped = encoder(batch, on_attention=lambda *_: None)[0]
        assert not torch.equal(mapped, encoder(batch, on_attention=lambda *_: None)[0])


def test_recomputed_activations_give_the_same_gradients(esm: Path) -> None:
    gradients = []
    for recompute in (False, True):
        encoder = load_encoder(esm).train()
        if recompute:
            encoder.model.gradient_checkpointing_enable()
        encoder(row(encoder))[0].square().sum().backward()
        gradients.append({name: one.grad for name, one in encoder.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_low_rank_adapters_act_where_peft_puts_them(esm: Path) -> None:
    peft = pytest.importorskip("peft")
    encoder = load_encoder(esm)
    batch = row(encoder)
    before = encoder(batch)[0].detach()
    peft.get_peft_model(encoder.model, peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False))
    after = encoder(batch)[0]
    assert largest_difference(after.detach(), before) > 1e-3
    after.sum().backward()
    trained = {name for name, one in encoder.named_parameters() if one.grad is not None}
    assert len(trained) == 3 * 2 * 2
    assert all("lora_" in name for name in trained)


def test_a_saved_encoder_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(folder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
        encoder.model.save_pretrained(tmp_path)
        copy_tokenizer(folder, tmp_path)
        again = load_encoder(tmp_path)
        assert torch.equal(again(row(again))[0], encoder(row(encoder))[0])


def test_bf16_is_near_fp32_and_keeps_rotary_frequencies(esm: Path) -> None:
    encoder, rounded = load_encoder(esm), load_encoder(esm, precision="bf16")
    with torch.no_grad():
        states, expected = rounded(row(rounded))[0], encoder(row(encoder))[0]
    assert states.dtype == torch.bfloat16
    assert largest_difference(states.float(), expected) < 0.05 * float(expected.abs().max())
    frequencies = [dict(one.named_buffers())["model.rotary_embeddings.inv_freq"] for one in (encoder, rounded)]
    assert torch.equal(*frequencies)


def test_order_in_the_row_does_not_matter(esm: Path) -> None:
    encoder = load_encoder(esm)
    order = np.random.default_rng(0).permutation(len(PROTEINS))
    with torch.no_grad():
        first, second = row(encoder), row(encoder, [PROTEINS[number] for number in order])
        expected = encoder(first)[0].split(first.lengths)
        for place, states in enumerate(encoder(second)[0].split(second.lengths)):
            assert largest_difference(states, expected[order[place]]) < 1e-5


@pytest.mark.gpu
def test_flash_attention_is_near_fp32(esm: Path) -> None:
    folder = esm.parent / "heads_of_16"
    esm_folder(folder, hidden_size=64)
    device = torch.device("cuda")
    encoder = load_encoder(folder, device=device)
    rounded = load_encoder(folder, device=device, precision="bf16")
    with torch.no_grad():
        expected = encoder(row(encoder).to(device))[0]
        states = rounded(row(rounded).to(device))[0].float()
    assert largest_difference(states, expected) < 0.05 * float(expected.abs().max())
