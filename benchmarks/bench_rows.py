"""Rows for training: packed, masked, collated tokens a second on a core, against megatron-core.

Both read the same indexed corpus in random order. The peer is `BERTMaskedWordPieceDataset`, one sequence a sample,
single tokens masked, padded to 512. Real tokens count (residues, <cls>, <eos>), padding does not. Also printed: the
share of padding, and the time of a plan for 34,353,433 sequences, as many as TAPE's Pfam has.
usage: python benchmarks/bench_rows.py [--rounds 3] [--seconds 1]
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from corpora import ESM, PFAM_SEQUENCES, like_pfam, write_corpora
from measure import compared, rates_in_turn, record

from megaprot.common.masking import MaskingConfig, masked_capacity
from megaprot.common.packing import to_tensors
from megaprot.common.packing_plan import plan_epoch
from megaprot.common.quiet import quiet
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.rows import RowShape
from megaprot.pretrain.stream import TrainingStream

quiet("megatron")
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

PEER_TOKENS = 512


def ours(corpus: Corpus, row_tokens: int) -> tuple[Callable[[], int], float]:
    """Return a function that makes a hundred rows of tensors and returns their real tokens; the share of padding."""
    masking = MaskingConfig()
    shape = RowShape(row_tokens, 1024, masking, masked_capacity(row_tokens, masking))
    stream, device, at = TrainingStream([corpus], shape, 0), torch.device("cpu"), 0
    num_rows = stream.num_rows(0)
    real = np.minimum(corpus.lengths + 2, 1024).sum()

    def rows() -> int:
        nonlocal at
        tokens = 0
        for _ in range(100):
            row = stream.row(0, at % num_rows)
            to_tensors(row, device)
            tokens += int(row.cu_seqlens[row.num_sequences])
            at += 1
        return tokens

    return rows, 1 - real / (num_rows * row_tokens)


def peer(corpus: Corpus) -> tuple[Callable[[], int], float]:
    """Return the same of megatron-core's data set."""
    tokenizer = SimpleNamespace(
        cls=ESM.begin, sep=ESM.end, mask=ESM.mask, pad=ESM.pad, unique_identifiers={"name": "esm"},
        inv_vocab=dict(enumerate(ESM.tokens)),
    )  # fmt: skip
    options: dict[str, Any] = {
        "random_seed": 0, "sequence_length": PEER_TOKENS, "tokenizer": tokenizer, "masking_probability": 0.15,
        "short_sequence_probability": 0.0, "masking_max_ngram": 1, "masking_do_full_word": True,
        "masking_do_permutation": False, "masking_use_longer_ngrams": False,
        "masking_use_geometric_distribution": False, "classification_head": False, "split": "1",
    }  # fmt: skip
    config = BERTMaskedWordPieceDatasetConfig(**options)
    indexed = IndexedDataset(str(corpus.prefix))
    numbers = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = BERTMaskedWordPieceDataset(
        indexed, str(corpus.prefix), numbers, corpus.num_sequences, Split.train, config
    )
    # <cls>, <sep> and residues, of which the data set's own index names the sequence and it keeps so many
    real = np.minimum(corpus.lengths[dataset.sample_index[:, 0].astype(np.int64)], PEER_TOKENS - 3) + 2
    order, at = np.random.default_rng(0).permutation(len(dataset)), 0

    def samples() -> int:
        nonlocal at
        tokens = 0
        for _ in range(16):
            number = order[at % len(order)]
            dataset[int(number)]
            tokens += int(real[number])
            at += 1
        return tokens

    return samples, 1 - real.mean() / PEER_TOKENS


def plan_of_pfam() -> dict[str, Any]:
    """Time the plan of an epoch of Pfam's size."""
    lengths = like_pfam(PFAM_SEQUENCES)
    plan_epoch(lengths[:1000], 2048, 1024, 2, 0, 0)
    start = time.perf_counter()
    plan = plan_epoch(lengths, 2048, 1024, 2, 0, 0)
    seconds = time.perf_counter() - start
    padding = 1 - np.minimum(lengths + 2, 1024).sum() / (plan.num_rows * 2048)
    return {
        "claim": f"the packing plan of {PFAM_SEQUENCES:,} sequences of mean length 158, rows of 2,048",
        "seconds": round(seconds, 2),
        "padding": round(float(padding), 5),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    """Measure in turn, print and record."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=1.0)
    given = options.parse_args()
    torch.set_num_threads(1)
    results = [plan_of_pfam()]
    with tempfile.TemporaryDirectory() as temporary:
        group = f"file://{temporary}/group"  # megatron-core's data set asks for its rank
        torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)
        for name, corpus in write_corpora(Path(temporary)).items():
            theirs, padding = peer(corpus)
            contenders, paddings = {"megatron-core": theirs}, {"megatron-core, padded to 512": padding}
            for row_tokens in (2048, 8192):
                contenders[f"megaprot, rows of {row_tokens:,}"], share = ours(corpus, row_tokens)
                paddings[f"megaprot, rows of {row_tokens:,}"] = share
            rates = rates_in_turn(contenders, given.rounds, given.seconds)
            claim = f"packed, masked, collated real tokens a second on one core; sequences: {name}"
            result = compared(claim, "tokens_per_second", rates, "megaprot, rows of 2,048")
            results.append(result | {"padding": {key: round(float(value), 4) for key, value in paddings.items()}})
        torch.distributed.destroy_process_group()
    record("rows", results, ["megatron-core", "numpy", "numba", "torch"])


if __name__ == "__main__":
    main()
