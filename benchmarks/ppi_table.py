"""Does a frozen encoder tell which proteins bind? ``ppi_embedding`` on Bernett's gold standard, then on yeast.

    python benchmarks/ppi_table.py --encoder HF_DIR --bernett DIR --dscript DIR --output DIR --seeds 3

Trained on all of Bernett's training pairs by the shipped recipe, measured on Bernett's test split and, as it is, on
D-SCRIPT's yeast set, beside the degree and k-mer baselines fitted on the same pairs. With several seeds values are
means and the spread is given. Steps that are finished are not taken again. Writes
``benchmarks/results/ppi_bernett.json`` and ``ppi_yeast.json``.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import record

METRICS = ("aupr", "auroc", "mcc", "f1", "precision", "recall", "accuracy", "ece", "ece_unscaled")


def run(command: list[str], result: Path) -> None:
    """Run a command of ``megaprot`` unless its result is there."""
    if not result.is_file():
        subprocess.run([sys.executable, "-m", "megaprot.tools.cli", *command], check=True)


def measured(results: Path, commands: list[list[str]], encoder: Path) -> dict[str, Any]:
    """Return what is kept of a report: metrics with intervals, baselines, leakage, and how it was made."""
    found = json.loads(results.read_text())
    kept = {name: found["metrics"][name] for name in METRICS}
    baselines = {
        name: {metric: values[metric] for metric in (*METRICS, "aupr_gain")}
        for name, values in found["baselines"].items()
    }
    spread = {name: value for name, value in found.get("standard_deviation", {}).items() if name in METRICS}
    return {
        "claim": "AUPR above the degree and the k-mer baseline",
        "split": found["split"],
        "note": "metrics: means over seeds; aupr_gain: of the first seed",
        "num_pairs": found["num_examples"],
        "metrics": kept,
        "standard_deviation_over_seeds": spread,
        "baselines": baselines,
        "clearly_beats": {name: values["aupr_gain"]["low"] > 0 for name, values in baselines.items()},
        "leakage": found["leakage"],
        "encoder": encoder_facts(encoder),
        "commands": [" ".join(["megaprot", *command]) for command in commands],
    }


def encoder_facts(encoder: Path) -> dict[str, Any]:
    """Return the encoder's shape and the table of its model card."""
    config = json.loads((encoder / "config.json").read_text())
    card = (encoder / "README.md").read_text() if (encoder / "README.md").is_file() else ""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and " | " in line[2:]]
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    return {name: config[name] for name in names} | {row[0]: row[1] for row in rows if len(row) == 2 and row[0]}


def main() -> None:
    """Train, measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("encoder", "bernett", "dscript", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--more", default="", help="more flags for megaprot finetune, in one string")
    options = parser.parse_args()
    tuned = options.output / "run"
    finetune = ["finetune", "--config", "ppi_embedding", "--model", str(options.encoder)]
    finetune += ["--data", str(options.bernett), "--output", str(tuned), "--seeds", str(options.seeds)]
    finetune += shlex.split(options.more)
    run(finetune, tuned / "results.json")
    for name, data, split in (("bernett", options.bernett, "test"), ("yeast", options.dscript, "yeast_test")):
        results = options.output / name / "results.json"
        evaluate = ["evaluate", "--task", "ppi_embedding", "--model", str(tuned), "--data", str(data), "--split", split]
        evaluate += ["--output", str(results.parent)]
        run(evaluate, results)
        record(f"ppi_{name}", [measured(results, [finetune, evaluate], options.encoder)], ["torch", "transformers"])


if __name__ == "__main__":
    main()
