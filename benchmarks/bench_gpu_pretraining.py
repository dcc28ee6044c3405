"""Training speed on one GPU: real residues a second, arithmetic over the data sheet's rate (MFU), and peak memory.

Ours trains the recipes' shapes in bf16 on packed rows. The peers train the same shape as a user would: transformers'
EsmForMaskedLM under bf16 autocast on batches of 64 padded to their longest, with SDPA and torch.compile, and with flash
attention where the package flash-attn is there. All take turns in one run; padding, <cls> and <eos> count for none.
Without a CUDA device the script says so and ends.
usage: python benchmarks/bench_gpu_pretraining.py [--shapes 8m 35m 150m 650m] [--row_tokens 32768] [--fp8]
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_pretraining import batches, masked
from corpora import ESM, write_corpora
from measure import compared, rates_in_turn, record
from transformers import EsmConfig, EsmForMaskedLM

from megaprot.common.command_line import parse_config
from megaprot.pretrain import parallel
from megaprot.pretrain.__main__ import RECIPES
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.config import ModelConfig, PretrainConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.throughput import peak_tflops, training_flops
from megaprot.pretrain.training import Training, _measures

LONGEST, PEER_BATCH, STEPS_AT_ONCE = 1024, 64, 10
ROWS_A_STEP = 4
Contender = Callable[[], int]


def together(step: Contender) -> Contender:
    """Return a function that takes some steps and then waits for the device, which else would lag behind the clock."""

    def steps() -> int:
        counted = sum(step() for _ in range(STEPS_AT_ONCE))
        torch.cuda.synchronize()
        return counted

    return steps


def model_of(shape: str) -> ModelConfig:
    """Return the shape of the recipe ``esm2_SHAPE``."""
    flags = ["--config", f"esm2_{shape}"]
    return parse_config(PretrainConfig, flags, program="bench", description="", recipes=RECIPES).model


class Ours:
    """Our training, which also adds up its arithmetic.

    Args:
        shape: Name of the recipe's shape.
        corpus: What to train on.
        row_tokens: Tokens of a row.
        has_fp8: Multiply in FP8.
        place: Of this process.
    """

    def __init__(self, shape: str, corpus: Corpus, row_tokens: int, has_fp8: bool, place: parallel.Place) -> None:
        config = PretrainConfig(model=model_of(shape))
        config.data.path, config.data.row_tokens = str(corpus.prefix.parent), row_tokens
        config.data.max_sequence_length, config.data.num_workers = LONGEST, 4
        config.train.global_batch_rows, config.train.eval_interval, config.train.fp8 = ROWS_A_STEP, 0, has_fp8
        config.run.dir = str(corpus.prefix.parent / f"run-{shape}-{row_tokens}")
        self.config, self.place = config, place
        self.training = Training(config, open_blend(config.data), place)
        self.steps = self.training.steps()
        self.residues = self.operations = 0.0

    def step(self) -> int:
        """Take one optimizer step and return its real residues."""
        number, rows, _ = next(self.steps)
        result, _ = self.training.take_step(number, rows, _measures(rows, self.place))
        residues, tokens, squared = result.requests
        self.residues += residues
        self.operations += training_flops(self.config.model, ESM.size, tokens, squared, result.tally.count)
        return round(residues)

    def mfu(self, residues_per_second: float) -> float:
        """Return arithmetic over the device's rate at this speed; 0 for a device whose data sheet is not known."""
        peak = peak_tflops(0.0)
        return residues_per_second * self.operations / self.residues / (1e12 * peak) if peak else 0.0


def of_transformers(shape: str, corpus: Corpus, attention: str) -> Contender:
    """Return a function that takes one optimizer step of a compiled EsmForMaskedLM and returns its real residues."""
    model = model_of(shape)
    config = EsmConfig(
        vocab_size=ESM.size, mask_token_id=ESM.mask, pad_token_id=ESM.pad, hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        intermediate_size=model.feed_forward_size, position_embedding_type="rotary", hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, token_dropout=False,
    )  # fmt: skip
    esm = EsmForMaskedLM._from_config(config, attn_implementation=attention).cuda()
    compiled: Any = torch.compile(esm, dynamic=True)
    optimizer = torch.optim.AdamW(esm.parameters(), lr=4e-4, fused=True)
    source = batches(corpus, False, PEER_BATCH, LONGEST)

    def step() -> int:
        sequences = next(source)
        tokens, labels, real = masked(sequences, max(map(len, sequences)) + 2)
        mask = (tokens != ESM.pad).long().pin_memory().cuda(non_blocking=True)
        tokens, labels = (tensor.pin_memory().cuda(non_blocking=True) for tensor in (tokens, labels))
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(esm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(real.sum())

    return step


def main() -> None:
    """Measure in turn, print and record."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--shapes", nargs="+", default=["8m", "35m", "150m", "650m"])
    options.add_argument("--row_tokens", type=int, default=32768)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--fp8", action="store_true", help="FP8 by Transformer Engine")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("training on a GPU: not measured, there is no CUDA device")
        return
    results: list[dict[str, Any]] = [{"device": torch.cuda.get_device_name(), "row_tokens": given.row_tokens}]
    has_flash = importlib.util.find_spec("flash_attn") is not None
    attentions = ["sdpa", *(["flash_attention_2"] if has_flash else [])]
    with tempfile.TemporaryDirectory() as temporary:
        place = parallel.lay_out(parallel.ParallelConfig(), parallel.start_processes(5))
        for name, corpus in write_corpora(Path(temporary)).items():
            for shape in given.shapes:
                torch.cuda.reset_peak_memory_stats()
                mine = Ours(shape, corpus, given.row_tokens, given.fp8, place)
                mine.step()
                peak_gb = torch.cuda.max_memory_allocated() / 1e9
                contenders = {"megaprot": together(mine.step)}
                for attention in attentions:
                    contenders[f"transformers, {attention}"] = together(of_transformers(shape, corpus, attention))
                rates = rates_in_turn(contenders, given.rounds, given.seconds)
                claim = f"residues a second in training on one GPU, ESM-2 {shape} shape, bf16; sequences: {name}"
                result = compared(claim, "residues_per_second", rates)
                mfu = mine.mfu(result["residues_per_second"]["megaprot"])
                results.append(result | {"mfu": round(mfu, 4), "peak_memory_gb": round(peak_gb, 2)})
                del mine, contenders
                torch.cuda.empty_cache()
        parallel.stop_processes()
    record(f"pretraining_gpu{'_fp8' if given.fp8 else ''}", results, ["megatron-core", "torch", "transformers"])


if __name__ == "__main__":
    main()
