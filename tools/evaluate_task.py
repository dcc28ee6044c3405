"""Measure a fine-tuned model on a split of its task, or the contacts that an encoder's attention shows untrained."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically
from megaprot.common.quiet import quiet
from megaprot.finetune.config import LabelConfig
from megaprot.finetune.evaluate import Request, evaluate
from megaprot.finetune.examples import Example, find_split, read_examples
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.metrics import NUM_SAMPLES
from megaprot.finetune.model_folder import models_of
from megaprot.finetune.processes import processes
from megaprot.finetune.tasks import open_task, task_names
from megaprot.pretrain.config import ParallelConfig

if TYPE_CHECKING:
    from megaprot.finetune.encoder import Encoder
    from megaprot.tools.evaluate import EvaluateConfig

UNSUPERVISED = "unsupervised_contacts"


def run_task(config: EvaluateConfig) -> None:
    """Evaluate as ``config`` says and print one line of numbers a split; of a task under ``torchrun`` on all processes.

    Raises:
        InputError: Model or data are missing, damaged or do not fit each other.
    """
    quiet("torch.distributed")
    known = ["mlm", UNSUPERVISED, *task_names()]
    if not config.task.endswith(".py") and config.task not in known:
        raise InputError(f"--task must be one of {', '.join(known)}, or a Python file, but got {config.task!r}.")
    if config.rows or config.max_tokens < 0 or config_to_yaml(config.parallel) != config_to_yaml(ParallelConfig()):
        raise InputError("--rows and --parallel are for --task mlm, and --max_tokens is 0 or more; leave them out.")
    if config.task == UNSUPERVISED:
        _run_unsupervised(config)
        return
    models_of(Path(config.model))
    task, splits = open_task(config.task, LabelConfig()), tuple(dict.fromkeys(config.split.split(",")))
    for split in splits:
        task.place_of(Path(config.data), split)
    if config.check_processes:
        print(f"model and data are there for {config.check_processes} processes")
        return
    request = Request(
        task=config.task,
        model=Path(config.model),
        data=Path(config.data),
        splits=splits,
        output=config.output,
        max_tokens=config.max_tokens,
        precision=config.precision,
    )
    with processes(30.0) as place:
        for found in evaluate(request, place):
            metrics = {name: one["value"] for name, one in found["metrics"].items()}
            told = {key: found[key] for key in ("task", "split", "num_examples", "output")}
            print(json.dumps(told | metrics), flush=True)


def _run_unsupervised(config: EvaluateConfig) -> None:
    """Fit a sparse regression on the attention of 20 training proteins and measure a split; one process."""
    from megaprot.finetune.splits import sampled
    from megaprot.finetune.unsupervised_contacts import NUM_FITTED, unsupervised_precision

    if config.check_processes > 1:
        raise InputError(f"--task {UNSUPERVISED} runs in one process; start it without a launcher.")
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise InputError(f"--output {config.output}: its folder does not exist; make it first.")
    model = Path(config.model)
    is_encoder = (model / "config.json").is_file()
    with nullcontext("") if is_encoder else tempfile.TemporaryDirectory() as folder:
        encoder = load_encoder(model if is_encoder else _converted(model, Path(folder)), precision=config.precision)
        train = sampled(_examples(config, encoder, "train"), NUM_FITTED, 0)
        measured = _examples(config, encoder, config.split)
        found = unsupervised_precision(encoder, train, measured, NUM_SAMPLES)
    told = {"task": config.task, "model": str(model), "data": config.data, "split": config.split}
    told |= {"num_examples": len(measured), "num_fitted": len(train)}  # type: ignore[dict-item]
    print(json.dumps(told | {name: one.value for name, one in found.items()}))
    if config.output:
        metrics = {name: vars(one) for name, one in found.items()}
        write_json_atomically(Path(config.output), told | {"metrics": metrics})


def _converted(model: Path, folder: Path) -> Path:
    """Return a run or checkpoint of pretraining as a Hugging Face folder."""
    from megaprot.tools import convert

    convert.run(convert.ConvertConfig(input=str(model), output=str(folder / "hf"), to="hf"))
    return folder / "hf"


def _examples(config: EvaluateConfig, encoder: Encoder, name: str) -> list[Example]:
    """Return the proteins of a split of contacts."""
    task = open_task("contact_prediction", LabelConfig())
    split = find_split(Path(config.data), task.folder, name)
    return read_examples(split, task.labels, encoder.vocabulary, task.label_of)
