"""Training speed on a CPU: real residues a second of ProteinBert against transformers' EsmForMaskedLM, in the same run.

Both train the ESM-2 8M shape on the shipped Pfam cut in random order, same optimizer, in turn. The peer is what a user
would write: bf16 autocast, SDPA attention, batches padded to their longest sequence, transformers' masking collator's
rates. Padding, <cls> and <eos> count for neither. Prints the medians and their ratio, and writes them as JSON.
usage: python benchmarks/bench_cpu_pretraining.py [--rounds 5] [--precision bf16]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import EsmConfig, EsmForMaskedLM

from megaprot.common.quiet import quiet
from megaprot.common.vocabulary import get_vocabulary

quiet("megatron")
from megaprot.pretrain import parallel
from megaprot.pretrain.blend import open_blend
from megaprot.pretrain.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, TrainConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.training import Training
from megaprot.tools import preprocess

ROOT = Path(__file__).parent.parent
PEER_BATCH = 16  # sequences
OUR_ROWS = 1  # of 4,096 tokens


def ours(folder: Path, precision: str) -> Callable[[], int]:
    """Return a function that takes one optimizer step and returns its real residues."""
    config = PretrainConfig(
        model=ModelConfig(),
        data=DataConfig(path=str(folder), row_tokens=4096),
        train=TrainConfig(num_steps=100_000, global_batch_rows=OUR_ROWS, precision=precision),  # type: ignore[arg-type]
        run=RunConfig(dir=str(folder / "run")),
    )
    place = parallel.lay_out(config.parallel, parallel.start_processes(5))
    training = Training(config, open_blend(config.data), place)
    steps = training.steps()

    def step() -> int:
        number, rows, _ = next(steps)
        training.take_step(number, rows, [])
        return sum(row.num_residues for row in rows)

    return step


def peer(folder: Path, precision: str) -> Callable[[], int]:
    """Return the same for EsmForMaskedLM as a user would train it."""
    vocabulary, corpus = get_vocabulary("esm"), Corpus.open(folder / "train")
    shape = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=20,
        intermediate_size=1280,
        position_embedding_type="rotary",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        token_dropout=False,
    )
    model = EsmForMaskedLM._from_config(shape, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
    generator = np.random.default_rng(0)

    def step() -> int:
        sequences = [corpus.sequence(int(index)) for index in generator.integers(0, corpus.num_sequences, PEER_BATCH)]
        longest = max(map(len, sequences)) + 2
        tokens = torch.full((PEER_BATCH, longest), vocabulary.pad)
        for row, ids in enumerate(sequences):
            tokens[row, : len(ids) + 2] = torch.tensor([vocabulary.begin, *ids.tolist(), vocabulary.end])
        real = ~torch.isin(tokens, torch.tensor([vocabulary.pad, vocabulary.begin, vocabulary.end]))
        chosen = real & (torch.rand(tokens.shape) < 0.15)
        labels = tokens.masked_fill(~chosen, -100)
        tokens = tokens.masked_fill(chosen & (torch.rand(tokens.shape) < 0.8), vocabulary.mask)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, attention_mask=(tokens != vocabulary.pad).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(real.sum())

    return step


def rate(step: Callable[[], int], seconds: float) -> float:
    """Return residues a second over at least ``seconds``."""
    start, residues = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        residues += step()
    return residues / (time.perf_counter() - start)


def main() -> None:
    """Measure in turn, print and record."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--seconds", type=float, default=6.0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "corpus"
        cut = ROOT / "examples" / "pfam" / "Pfam-A.cut.fasta.gz"
        preprocess.run(preprocess.PreprocessConfig(input=[str(cut)], output=str(folder)))
        contenders = {"transformers": peer(folder, given.precision), "megaprot": ours(folder, given.precision)}
        for step in contenders.values():
            rate(step, 2.0)  # warm up
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, step in contenders.items():
                rates[name].append(rate(step, given.seconds))
        parallel.stop_processes()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "claim": "residues a second in training, ESM-2 8M shape, shipped Pfam cut in random order, padding not counted",
        "precision": given.precision,
        "residues_per_second": {name: round(value) for name, value in medians.items()},
        "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
        "ratio": round(medians["megaprot"] / medians["transformers"], 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", "benchmarks/bench_cpu_pretraining.py", *sys.argv[1:]]),
    }
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    (results / f"cpu_pretraining_{given.precision}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
