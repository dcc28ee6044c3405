"""Training speed on a CPU: real residues a second, against what a user would run instead, in the same run.

All train the same ESM-2 shape, one optimizer step after another, in random order (or grouped by length, where said).
The peers are transformers' EsmForMaskedLM (bf16 autocast, SDPA, batches of 16 padded to their longest sequence), the
same on batches grouped by length as transformers' Trainer does, and megatron-core's own BertModel (bf16 weights, its
DotProductAttention, padded to 512). Padding, <cls> and <eos> count for none. Each has a process of its own, with the
environment its user would have.
usage: python benchmarks/bench_pretraining.py [--shapes 8m] [--rounds 2] [--seconds 3] [--precision bf16]
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpora import ESM, write_corpora
from measure import SHAPES, apart, compared, rates_in_turn, record
from numpy.typing import NDArray
from ranks import config_of
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM

from megaprot.common.quiet import quiet

quiet("megatron")
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megaprot.pretrain import parallel
from megaprot.pretrain.__main__ import OPENMP
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.training import Training

LONGEST = 512  # residues and the two tokens around them, for all
PEER_BATCH = 16
Contender = Callable[[], int]


def ours(shape: str, folder: Path, precision: Any) -> Contender:
    """Return a function that takes one optimizer step on the corpora of a folder and returns its real residues."""
    config = config_of(shape, folder, 4096, LONGEST, precision=precision)
    place = parallel.lay_out(parallel.ParallelConfig(), parallel.start_processes(5))
    training = Training(config, open_blend(config.data), place)
    steps = training.steps()

    def step() -> int:
        number, rows, _ = next(steps)
        training.take_step(number, rows, [])
        return sum(row.num_residues for row in rows)

    return step


def batches(
    corpus: Corpus, is_grouped: bool, size: int = PEER_BATCH, longest: int = LONGEST
) -> Iterator[list[NDArray[Any]]]:
    """Yield batches of sequences in random order; grouped: sorted by length among 50 batches, as the Trainer does."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(corpus.num_sequences)
        for start in range(0, len(order), 50 * size):
            pool = order[start : start + 50 * size]
            if is_grouped:
                pool = pool[np.argsort(corpus.lengths[pool])]
            chunks = [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
            for number in generator.permutation(len(chunks)):
                yield [corpus.sequence(int(index))[: longest - 2] for index in chunks[number]]


def masked(sequences: list[NDArray[Any]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded tokens, labels (-100 where nothing is asked) and where residues are, masked as collators do."""
    tokens = torch.full((len(sequences), width), ESM.pad)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids) + 2] = torch.tensor([ESM.begin, *ids.tolist(), ESM.end])
    real = ~torch.isin(tokens, torch.tensor([ESM.pad, ESM.begin, ESM.end]))
    chosen = real & (torch.rand(tokens.shape) < 0.15)
    labels = tokens.masked_fill(~chosen, -100)
    return tokens.masked_fill(chosen & (torch.rand(tokens.shape) < 0.8), ESM.mask), labels, real


def finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take the optimizer step that belongs to a loss."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def of_transformers(shape: str, folder: Path, precision: str, is_grouped: bool) -> Contender:
    """Return the same for EsmForMaskedLM as a user would train it."""
    num_layers, hidden_size = SHAPES[shape]
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=20, intermediate_size=4 * hidden_size, position_embedding_type="rotary",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, token_dropout=False,
    )  # fmt: skip
    model = EsmForMaskedLM._from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
    source = batches(Corpus.open(folder / "train"), is_grouped)

    def step() -> int:
        sequences = next(source)
        tokens, labels, real = masked(sequences, max(map(len, sequences)) + 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, attention_mask=(tokens != ESM.pad).long(), labels=labels).loss
        finish(model, optimizer, loss)
        return int(real.sum())

    return step


def of_megatron(shape: str, folder: Path, precision: str) -> Contender:
    """Return the same for megatron-core's BertModel, padded to 512 as its data set pads."""
    parallel.lay_out(parallel.ParallelConfig(), parallel.start_processes(5))
    num_layers, hidden_size = SHAPES[shape]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=20, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, attention_backend=AttnBackend.local, params_dtype=dtype,
        bf16=precision == "bf16", gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
    )  # fmt: skip
    model = BertModel(
        config, num_tokentypes=0, transformer_layer_spec=bert_layer_local_spec, vocab_size=128,
        max_sequence_length=LONGEST, add_binary_head=False, parallel_output=True,
        share_embeddings_and_output_weights=True, position_embedding_type="rope",
    ).to(dtype)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
    source = batches(Corpus.open(folder / "train"), False)

    def step() -> int:
        tokens, labels, real = masked(next(source), LONGEST)
        losses, _ = model(tokens, (tokens != ESM.pad).long(), lm_labels=labels.clamp(min=0))
        asked = labels >= 0
        finish(model, optimizer, (losses.float() * asked).sum() / asked.sum())
        return int(real.sum())

    return step


CONTENDERS: dict[str, tuple[Callable[..., Contender], tuple[Any, ...], dict[str, str]]] = {
    "megaprot": (ours, (), OPENMP),
    "transformers, random order": (of_transformers, (False,), {}),
    "transformers, grouped by length": (of_transformers, (True,), {}),
    "megatron-core BertModel, padded to 512": (of_megatron, (), {}),
}


def main() -> None:
    """Measure in turn, print and record."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8m"])
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--seconds", type=float, default=3.0)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpora = write_corpora(Path(temporary))
        for shape in given.shapes:
            results: list[dict[str, Any]] = [{"threads": torch.get_num_threads()}]
            for name in corpora:
                about = shape, Path(temporary) / name, given.precision
                with ExitStack() as stack:
                    contenders = {
                        contender: stack.enter_context(apart(make, *about, *more, environment=environment))
                        for contender, (make, more, environment) in CONTENDERS.items()
                    }
                    rates = rates_in_turn(contenders, given.rounds, given.seconds)
                claim = f"residues a second in training, ESM-2 {shape} shape, {given.precision}; sequences: {name}"
                results.append(compared(claim, "residues_per_second", rates))
            packages = ["megatron-core", "torch", "transformers"]
            record(f"pretraining_cpu_{shape}_{given.precision}", results, packages)


if __name__ == "__main__":
    main()
