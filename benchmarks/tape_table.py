"""Does pretraining pay? One encoder, pretrained and with random weights, on TAPE's five tasks by the same recipes.

    python benchmarks/tape_table.py --encoder HF_DIR --data TAPE_DIR --output DIR --steps 1000 --seeds 3

Each task is fine-tuned for a fixed number of optimizer steps by its shipped recipe (smaller batches, for a CPU's sake),
from the encoder as it is and from one of the same shape with random weights; the best model by the validation split is
measured on the test split, or on ``--test_examples`` proteins drawn from it. A cell is the mean over seeds, with the
standard deviation, and the mean of the seeds' bootstrap intervals. Finished runs are not taken again, so that several
programs may share the tasks (``--tasks``) and one collects. Writes ``benchmarks/results/tape.json``, prints a table.
"""

import argparse
import contextlib
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import record

from megaprot.common.files import atomic_write, folder_written_whole

TESTS = {
    "secondary_structure": ("cb513", "accuracy", 8),
    "contact_prediction": ("test", "precision_at_l5_min_sep_6", 4),
    "remote_homology": ("test_fold_holdout", "top1_accuracy", 16),
    "fluorescence": ("test", "spearman", 8),
    "stability": ("test", "spearman", 32),
}
"""{task: (split, metric, proteins a step)}."""
FOLDERS = {"contact_prediction": "proteinnet"}


def drawn_data(task: str, options: argparse.Namespace) -> Path:
    """Return a folder with a task's data, its test split cut to ``--test_examples`` proteins drawn from all."""
    name = FOLDERS.get(task, task)
    given, folder = Path(options.data) / name, options.output / f"data_{options.test_examples or 'all'}" / name
    test = given / f"{name}_{TESTS[task][0]}.json"
    if not test.is_file():
        raise SystemExit(f"{test} does not exist; give --data TAPE's folder with raw JSON.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in given.glob("*.json"):
        if file == test and options.test_examples:
            records = json.loads(file.read_text(encoding="utf-8"))
            number = min(len(records), options.test_examples)
            with atomic_write(folder / file.name) as stream:
                stream.write(json.dumps(random.Random(0).sample(records, number)).encode())
        elif not (folder / file.name).exists():
            with contextlib.suppress(FileExistsError):  # made by another program meanwhile
                (folder / file.name).symlink_to(file.resolve())
    return folder


def random_encoder(encoder: Path, folder: Path) -> Path:
    """Write an encoder of the same shape and tokenizer with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from megaprot.finetune.hugging_face import copy_tokenizer

    if not folder.is_dir():
        torch.manual_seed(0)
        with folder_written_whole(folder) as partial:
            AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(encoder)).save_pretrained(partial)
            copy_tokenizer(encoder, partial)
    return folder


def measured(task: str, encoder: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune and evaluate; return the cell of a task and an encoder, with the commands that made it."""
    split, metric, batch_size = TESTS[task]
    data = str(drawn_data(task, options))
    program = [sys.executable, "-m", "megaprot.tools.cli"]
    finetune = ["finetune", "--config", task, "--model", str(encoder), "--data", data, "--output", str(output)]
    finetune += ["--seeds", str(options.seeds), "--train.num_steps", str(options.steps)]
    finetune += ["--train.batch_size", str(batch_size), "--train.eval_interval", str(options.eval_interval)]
    finetune += ["--train.patience", "0", "--train.train_examples", str(options.train_examples)]
    finetune += ["--train.valid_examples", str(options.valid_examples), *shlex.split(options.more)]
    evaluate = ["evaluate", "--task", task, "--model", str(output), "--data", data, "--split", split]
    results = output / f"evaluation_{split}" / "results.json"
    if not results.is_file():
        for command in (finetune, evaluate):
            subprocess.run([*program, *command], check=True)
    found = json.loads(results.read_text())
    cell = {"split": split, "metric": metric, "num_examples": found["num_examples"], **found["metrics"][metric]}
    cell["standard_deviation"] = found.get("standard_deviation", {}).get(metric)
    cell["by_seed"] = found.get("values_by_model", {}).get(metric)
    return cell | {"commands": [" ".join(["megaprot", *map(shlex.quote, one)]) for one in (finetune, evaluate)]}


def main() -> None:
    """Measure all cells and record them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--encoder", type=Path, required=True, help="pretrained Hugging Face folder")
    parser.add_argument("--data", required=True, help="TAPE's data folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_examples", type=int, default=0, help="training proteins, drawn by the seed; 0: all")
    parser.add_argument("--valid_examples", type=int, default=0, help="validation proteins, drawn by the seed; 0: all")
    parser.add_argument("--test_examples", type=int, default=0, help="test proteins, drawn once; 0: all")
    parser.add_argument("--eval_interval", type=int, default=100, help="steps between validations")
    parser.add_argument("--tasks", nargs="*", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--more", default="", help="more flags for megaprot finetune, in one string")
    options = parser.parse_args()
    encoders = {
        "pretrained": options.encoder,
        "from scratch": random_encoder(options.encoder, options.output / "random"),
    }
    rows = []
    for task in options.tasks:
        cells = {
            name: measured(task, encoder, options.output / f"{task}-{name.replace(' ', '_')}", options)
            for name, encoder in encoders.items()
        }
        rows.append({"task": task, **cells})
        print(f"{task:<22}{cells['pretrained']['metric']:<28}", *(
            f"{name} {cell['value']:.4f} ({cell['low']:.4f} to {cell['high']:.4f})  " for name, cell in cells.items()
        ), flush=True)  # fmt: skip
    record("tape", rows, ["torch", "transformers", "deepspeed"])


if __name__ == "__main__":
    main()
