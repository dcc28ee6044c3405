"""Pairs a minute and peak memory of all-vs-all prediction on embeddings, for a proteome of random vectors.

``python benchmarks/bench_ppi_screening.py [--proteins 20000]  [--hidden_size 512] [--top_k 20]``: the
first rows of all pairs of so many proteins, scored and cut to the best partners of each as ``megaprot predict`` does;
the rate is that of pairs scored. The peers score the same pairs by the plain forward pass of the same network, pairs in
batches of 4,096 and 65,536, and keep nothing.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from measure import compared, rates_in_turn, record

from megaprot.finetune.pairs.embedding_scorer import PairScorer
from megaprot.finetune.pairs.scoring import EmbeddingScoring
from megaprot.finetune.pairs.screening import Screen, blocks_of, kept_of, lines_of

NUM_FEATURES = 1281


def peer(scorer: PairScorer, vectors: torch.Tensor, batch: int) -> Callable[[], int]:
    """Return a pass over one batch of pairs: both vectors through the network."""
    first, second = (torch.randint(len(vectors), (batch,)) for _ in range(2))

    def run() -> int:
        with torch.inference_mode():
            scorer(vectors[first], vectors[second])
        return batch

    return run


def ours(scoring: EmbeddingScoring, screen: Screen) -> Callable[[], int]:
    """Return a pass over one block of rows: score, keep, make the lines."""
    blocks = blocks_of(screen, scoring.pairs_a_part)
    names = [f"P{number:05d}" for number in range(screen.num_columns)]
    done = 0

    def run() -> int:
        nonlocal done
        rows = blocks[done % len(blocks)]
        done += 1
        lines_of(kept_of(scoring, screen, rows), names, names, 1.0)
        return len(rows) * (screen.num_columns - 1)

    return run


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proteins", type=int, default=20_000)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vectors = torch.randn(arguments.proteins, NUM_FEATURES, device=device)
    scorer = PairScorer(NUM_FEATURES, arguments.hidden_size, 0.1).to(device).eval()
    scorer.standardise(vectors)
    with torch.inference_mode():
        scoring = EmbeddingScoring(scorer, scorer.parts(vectors))
    screen = Screen(arguments.proteins, arguments.proteins, True, arguments.top_k, float("-inf"))
    run = ours(scoring, screen)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    num_pairs = run()
    first = num_pairs / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contenders = {"megaprot": run} | {
        f"forward pass, batches of {size:,}": peer(scorer, vectors, size) for size in (4096, 65536)
    }
    rates = rates_in_turn(contenders, arguments.rounds, arguments.seconds)
    claim = (
        f"all pairs of {arguments.proteins:,} proteins from embeddings, {device.type}, {torch.get_num_threads()} "
        "threads: at least 10 million pairs a minute on 2 cores"
    )
    per_minute = {name: [60 * value for value in values] for name, values in rates.items()}
    result = compared(claim, "pairs_a_minute", per_minute)
    result["first_block_pairs_a_minute"] = round(60 * first)
    result["peak_memory_megabytes"] = {"with proteins": round(before / 1024), "after a block": round(peak / 1024)}
    record("ppi_screening", [result], ["torch"])


if __name__ == "__main__":
    main()
