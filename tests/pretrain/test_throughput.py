"""Arithmetic of a step against hand counts and torch's own counter, parameters against the model's."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaprot.common.metrics_log import read_metrics
from megaprot.common.packing import to_tensors
from megaprot.pretrain import throughput
from megaprot.pretrain.config import ModelConfig, PretrainConfig
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.report import count_parameters, progress_line
from megaprot.pretrain.throughput import peak_memory_bytes, peak_tflops, training_flops
from tests.pretrain.runs import begin, run, small_config, write_corpus
from tests.pretrain.tiny import PADDED_SIZE


def test_training_flops_equal_a_hand_count() -> None:
    model = ModelConfig(num_layers=2, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2)
    # Sequences of 3 and 5 tokens, 2 masked positions, 33 tokens in the vocabulary; multiply-adds of a forward pass:
    # queries, keys, values, output: 4 x 4 x 4 a token; feed-forward: 2 x 4 x 8 a token
    # scores and weighted sum: 2 x 4 a pair of tokens of one sequence; head: 4 x 4 + 4 x 33 a masked position
    # the last layer: queries, keys, values of all tokens, the rest for 2 tokens of 8
    last = 8 * 48 + 2 * (16 + 64) + (9 + 25) * 8 / 4
    multiply_adds = 8 * (64 + 64) + (9 + 25) * 8 + last + 2 * (16 + 132)
    assert training_flops(model, 33, 8, 9 + 25, 2) == 3 * 2 * multiply_adds


@pytest.mark.parametrize("shape", [{}, {"ffn_hidden_size": 80}, {"num_layers": 3, "position_embedding": "learned"}])
def test_training_flops_equal_those_torch_counts(shape: dict[str, Any], tmp_path: Path, alone: Place) -> None:
    # Rows without padding: two sequences of 62 and two boundary tokens in 128.
    config = small_config(write_corpus(tmp_path / "corpus", [62] * 4), tmp_path / "run", model=shape)
    training = begin(config, alone)
    batch = to_tensors(training.stream.row(0, 0), alone.device)
    assert batch.segment_lengths == (64, 64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = training.chunks[0].module(batch)
        logits[:, : training.blend.vocabulary.size].sum().backward()
    # What runs computes all places for masked positions, and the padded vocabulary.
    places = len(batch.masked_positions)
    assert counter.get_total_flops() == training_flops(config.model, PADDED_SIZE, 128, 2 * 64**2, places)


@pytest.mark.parametrize(
    "shape",
    [{}, {"ffn_hidden_size": 80, "num_layers": 3}, {"position_embedding": "learned", "activation": "gelu_tanh"}],
)
def test_parameters_are_counted_without_padding_of_the_vocabulary(
    shape: dict[str, Any], tmp_path: Path, alone: Place
) -> None:
    training = begin(small_config(write_corpus(tmp_path / "corpus"), tmp_path / "run", model=shape), alone)
    size = training.blend.vocabulary.size
    weights = [
        parameter[:size]
        if parameter.shape[0] == PADDED_SIZE and name.endswith(("word_embeddings.weight", "output_layer.bias"))
        else parameter
        for name, parameter in training.chunks[0].module.named_parameters()
    ]
    assert count_parameters(training.config, size) == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize(("num_layers", "hidden_size"), [(6, 320), (33, 1280)])
def test_parameters_are_as_many_as_transformers_has(num_layers: int, hidden_size: int) -> None:
    from transformers import EsmConfig, EsmForMaskedLM

    shape = {"num_hidden_layers": num_layers, "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    tokens = {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1}
    with torch.device("meta"):
        theirs = EsmForMaskedLM(EsmConfig(**tokens, **shape, num_attention_heads=20, position_embedding_type="rotary"))
    weights = {name: part.numel() for name, part in theirs.named_parameters() if "contact_head" not in name}
    config = PretrainConfig(model=ModelConfig(num_layers, hidden_size, num_attention_heads=20))
    assert count_parameters(config, 33) == sum(weights.values())


def test_peak_rate_is_the_given_one_or_unknown_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: False)
    assert peak_tflops(12.5) == 12.5
    assert peak_tflops(0.0) == 0.0


@pytest.mark.parametrize(("name", "rate"), [("NVIDIA H100 80GB HBM3", 989.0), ("Tesla T4", 0.0)])
def test_peak_rate_of_a_gpu_is_its_data_sheets(name: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: name)
    assert peak_tflops(0.0) == rate
    assert peak_tflops(7.0) == 7.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's process table")
def test_memory_is_the_peak_the_system_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: False)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert 0.95 * peak <= peak_memory_bytes() < 1e12


def test_rates_of_a_row_fit_its_arithmetic(tmp_path: Path, alone: Place) -> None:
    config = small_config(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train={"log_interval": 2, "num_steps": 4}
    )
    config.run.peak_tflops = 0.5
    training = begin(config, alone)
    began = time.perf_counter()
    run(training)
    taken = time.perf_counter() - began
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    built = [training.stream.row(epoch, row) for epoch, row in _places(training, 16)]
    residues = sum(row.num_residues for row in built)
    lengths = [
        float(b - a)
        for row in built
        for a, b in zip(row.cu_seqlens[: row.num_sequences], row.cu_seqlens[1:], strict=False)
    ]
    masked = sum(int((row.masked_kind > 0).sum()) for row in built)
    flops = training_flops(config.model, 33, sum(lengths), sum(length**2 for length in lengths), masked)
    first = rows[0]
    seconds = residues / first["residues_per_second"]
    assert 0 < seconds < taken
    assert first["tflops_per_device"] == pytest.approx(flops / seconds / 1e12)
    assert first["mfu"] == pytest.approx(first["tflops_per_device"] / 0.5)
    assert first["seconds_left"] == pytest.approx(seconds)
    assert first["consumed_residues"] == residues
    assert rows[-1]["seconds_left"] == 0.0
    assert f"MFU {100 * first['mfu']:.1f} %" in progress_line(first)


def _places(training: Any, num_rows: int) -> list[tuple[int, int]]:
    """(epoch, row) of the first rows of the stream."""
    places = []
    epoch = row = 0
    for _ in range(num_rows):
        if row == training.stream.num_rows(epoch):
            epoch, row = epoch + 1, 0
        places.append((epoch, row))
        row += 1
    return places
