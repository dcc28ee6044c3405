"""What a cross-encoder learns from a stratified subset of Bernett's gold standard that a CPU can read.

    python benchmarks/ppi_subset.py --encoder HF_DIR --bernett DIR --output DIR

Half of the pairs bind: 8,000 to train on, 600 to validate, 3,000 to test, drawn by a fixed seed; the degree and k-mer
baselines of the report see the same training pairs. Steps that are finished are not taken again. Writes
``benchmarks/results/ppi_cross_encoder.json``.
"""

import argparse
import random
from pathlib import Path

from measure import record
from ppi_table import measured, run

SIZES = {"train": 8000, "valid": 600, "test": 3000}
SETTINGS = ["--ppi.max_length", "402", "--train.precision", "bf16", "--train.num_steps", "250", "--train.batch_size",
            "32", "--train.eval_interval", "250", "--optim.lr", "2e-4", "--optim.encoder_lr", "1e-4"]  # fmt: skip


def draw(source: Path, target: Path) -> None:
    """Write as many binding and other pairs of each split as ``SIZES`` says, in random order."""
    target.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        lines = (source / f"{name}.tsv").read_text().splitlines()
        chance = random.Random(0)
        chosen = [line for end in "10" for line in chance.sample([x for x in lines if x[-1] == end], size // 2)]
        chance.shuffle(chosen)
        (target / f"{name}.tsv").write_text("\n".join(chosen) + "\n")
    if not (target / "sequences.fasta").exists():
        (target / "sequences.fasta").symlink_to((source / "sequences.fasta").absolute())


def main() -> None:
    """Draw, train, evaluate, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--bernett", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    data, trained = options.output / "data", options.output / "run"
    draw(options.bernett, data)
    where = ["--data", str(data)]
    train = ["finetune", "--config", "ppi", "--model", str(options.encoder), *where, "--output", str(trained)]
    train += SETTINGS
    run(train, trained / "last" / "task.json")
    results = trained / "evaluation_test" / "results.json"
    evaluate = ["evaluate", "--task", "ppi", "--model", str(trained), *where, "--split", "test", "--precision", "bf16"]
    run(evaluate, results)
    found = measured(results, [train, evaluate], options.encoder)
    record("ppi_cross_encoder", [found], ["torch", "transformers", "deepspeed"])


if __name__ == "__main__":
    main()
