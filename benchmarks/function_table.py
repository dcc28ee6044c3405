"""Protein function: what models reach beside the baselines, on the four-way grid of a data folder.

    python benchmarks/function_table.py --data FUNCTION_DIR --methods kmer mmseqs

Every split is drawn as ``megaprot finetune --task function`` draws it (``function.split``); each of ``--withhold`` is
whether the descendants of an unseen term are unseen too. Baselines see training labels alone; nearest neighbours are
found by each of ``--methods``. Writes ``benchmarks/results/function_baselines.json`` and prints a table.

    megaprot finetune --config function --model ENCODER --text-model TEXT_ENCODER --data FUNCTION_DIR --output RUNS \\
        --seeds 3 --function.vectors VECTORS
    python benchmarks/function_table.py --data FUNCTION_DIR --runs RUNS/seed_1 RUNS/seed_2 RUNS/seed_3

evaluates models of frozen towers on the split they were trained with, alone and as the mean of their scores and those
of nearest neighbours by the first of ``--methods``, and writes ``benchmarks/results/function.json``.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import record
from numpy.typing import NDArray
from safetensors.torch import load_file

from megaprot.common.command_line import parse_config
from megaprot.finetune.batching import plan_batches
from megaprot.finetune.config import FinetuneConfig
from megaprot.finetune.config_function import SplitConfig
from megaprot.finetune.function.annotations import FunctionData, read_function_data
from megaprot.finetune.function.function_baselines import baselines
from megaprot.finetune.function.function_metrics import Scorer, evaluate
from megaprot.finetune.function.ontology import ASPECTS
from megaprot.finetune.function.splits import SPLITS, TEST, FunctionSplit, split_data
from megaprot.finetune.function.two_towers import ProteinPart
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.protein_states import gather_proteins
from megaprot.finetune.residues import encode
from megaprot.finetune.tasks import open_task

GRID = ("pooled_auroc", "pooled_aupr", "pooled_f1", "macro_auroc", "macro_aupr")
UNSEEN_PROTEINS = ("unseen_protein_seen_term", "unseen_protein_unseen_term")


def sizes(data: FunctionData, split: FunctionSplit) -> dict[str, Any]:
    """Return how many proteins, clusters and terms a split has."""
    return {
        "proteins": {name: int((split.proteins == number).sum()) for number, name in enumerate(SPLITS)},
        "clusters": int(split.clusters.max()) + 1,
        "seen_terms": int(split.is_seen.sum()),
        "unseen_terms": {SPLITS[of]: int((split.terms == of).sum()) for of in range(1, len(SPLITS))},
        "unseen_test_terms_in_macro": int(
            (np.asarray(data.labels[split.numbers_of(TEST)].sum(axis=0))[split.terms == TEST] >= 10).sum()
        ),
    }


def rounded(value: Any) -> Any:
    """Return a nested result with four digits a number; what is not finite is null."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return (round(value, 4) if np.isfinite(value) else None) if isinstance(value, float) else value


def measured(name: str, data: FunctionData, split: FunctionSplit, scorer: Scorer) -> dict[str, Any]:
    """Evaluate one scorer and print its line."""
    start = time.perf_counter()
    found = evaluate(data, split, scorer)
    seconds = time.perf_counter() - start
    fmax = " ".join(f"{found['protein_centric'][aspect]['fmax']:.3f}" for aspect in ASPECTS)
    smin = " ".join(f"{found['protein_centric'][aspect]['smin']:.2f}" for aspect in ASPECTS)
    cells = "  ".join(
        " ".join(f"{found['grid'][cell]['all'][metric]:.3f}" for metric in GRID) for cell in UNSEEN_PROTEINS
    )
    print(f"{name:<28} fmax {fmax}  smin {smin}  seen {cells.replace('  ', '  unseen ')}  {seconds:.0f} s", flush=True)
    return {"name": name, "seconds": round(seconds, 1), **rounded(found)}


def model_scorer(run: Path, data: FunctionData) -> tuple[SplitConfig, Scorer]:
    """Return a run's split and what scores with its best model; vectors of frozen towers are taken where they are kept.

    The towers are those the run began with, since frozen ones do not change.
    """
    recipe = ["--config", str(run / "config.yaml")]
    config: FinetuneConfig = parse_config(FinetuneConfig, recipe, program="function_table", description="")
    task: Any = open_task(config.task, config.labels)
    task.configure(config)
    encoder = load_encoder(Path(config.model))
    task.read(Path(config.data), "valid", encoder.vocabulary)
    head = task.build_head(config.head, encoder)
    head.load_state_dict(load_file(run / "best" / "head.safetensors"))
    model = task.build_model(encoder, head, True).eval()
    residues = [encode(encoder.vocabulary, sequence) for sequence in data.sequences]

    def score(proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = []
        with torch.no_grad():
            vectors = model.project_terms(terms)
            batches = plan_batches([len(residues[one]) for one in proteins.tolist()], 8192, True)
            for batch in batches:
                ids = [residues[one] for one in proteins[batch].tolist()]
                rows_read = gather_proteins(encoder.vocabulary, encoder.longest, ids)
                pooled = model.protein_vectors(ProteinPart(rows_read, proteins[batch]))
                rows.append(torch.sigmoid(model.head.score(model.head.project_proteins(pooled), vectors)).numpy())
        order = np.argsort([member for batch in batches for member in batch])
        return np.concatenate(rows)[order]

    return config.function.split, score


def mean_of(first: Scorer, second: Scorer) -> Scorer:
    """Return what scores with the mean of two."""
    return lambda proteins, terms: (first(proteins, terms) + second(proteins, terms)) / 2


def measure_runs(data: FunctionData, runs: list[Path], methods: list[str]) -> None:
    """Evaluate the models of several seeds, alone and with nearest neighbours; record each, mean and spread."""
    alone, joined = [], []
    neighbours: Scorer | None = None
    for run in runs:
        config, scorer = model_scorer(run, data)
        split = split_data(data, config)
        about = {"run": str(run), "split": asdict(config)}
        alone.append(about | measured("two towers", data, split, scorer))
        if methods:
            neighbours = neighbours or Remembered(baselines(data, split, methods[0])["nearest_neighbours"])
            name = f"mean of two towers and nearest_neighbours ({methods[0]})"
            joined.append(about | measured(name, data, split, mean_of(scorer, neighbours)))
    summaries = [{"name": rows[0]["name"], "over_seeds": summary(rows)} for rows in (alone, joined) if rows]
    record("function", [*summaries, *alone, *joined], ["torch", "transformers", "numpy"])


class Remembered:
    """A scorer that keeps what it gave: the neighbours of one split are the same for the models of all seeds."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._kept: dict[bytes, NDArray[np.float32]] = {}

    def __call__(self, proteins: NDArray[np.int64], terms: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return scores, those given before if asked for the same proteins and terms."""
        key = proteins.tobytes() + terms.tobytes()
        if key not in self._kept:
            self._kept[key] = self.scorer(proteins, terms)
        return self._kept[key]


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and spread over seeds of what every row has."""
    cells = {
        f"{cell} {namespace} {metric}": [one["grid"][cell][namespace][metric] for one in rows]
        for cell in rows[0]["grid"]
        for namespace in (*ASPECTS, "all")
        for metric in GRID
    }
    cells |= {
        f"{metric} {aspect}": [one["protein_centric"][aspect][metric] for one in rows]
        for aspect in ASPECTS
        for metric in ("fmax", "smin")
    }
    return {
        name: {"mean": round(float(np.mean(values)), 4), "standard_deviation": round(float(np.std(values, ddof=1)), 4)}
        for name, values in cells.items()
        if None not in values and len(values) > 1
    }


def main() -> None:
    """Measure all baselines on all splits, or the models of some runs, and record them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of sequences, annotations and ontology")
    parser.add_argument("--methods", nargs="*", default=["kmer"], help="how neighbours are found")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="seeds of the split")
    parser.add_argument("--withhold", nargs="*", type=int, default=[0, 1], choices=[0, 1])
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="evaluate these instead of the baselines")
    options = parser.parse_args()
    data = read_function_data(options.data)
    if options.runs:
        measure_runs(data, options.runs, options.methods)
        return
    rows = []
    print("grid of unseen proteins, seen and unseen terms:", ", ".join(GRID))
    for seed in options.seeds:
        for withhold in map(bool, options.withhold):
            config = SplitConfig(seed=seed, withhold_descendants=withhold)
            split = split_data(data, config)
            print(f"seed {seed}, descendants withheld: {withhold}")
            found = baselines(data, split, options.methods[0]) if options.methods else {}
            scorers = {name: scorer for name, scorer in found.items() if name != "nearest_neighbours"}
            for method in options.methods if not rows else options.methods[:1]:
                scorers[f"nearest_neighbours ({method})"] = baselines(data, split, method)["nearest_neighbours"]
            results = [measured(name, data, split, scorer) for name, scorer in scorers.items()]
            rows.append({"split": asdict(config), "sizes": sizes(data, split), "results": results})
    counts = {"counts": data.counts, "ontology": data.ontology.version}
    record("function_baselines", [counts, *rows], ["numpy", "scipy", "obonet"])


if __name__ == "__main__":
    main()
