"""Measure a checkpoint's loss and perplexities on a corpus, or a fine-tuned model's metrics on a split of a task."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megaprot.common.errors import InputError
from megaprot.common.manifest import MANIFEST, damaged_file
from megaprot.common.quiet import quiet
from megaprot.pretrain.config import ParallelConfig


@dataclass
class EvaluateConfig:
    """What ``megaprot evaluate`` can be told.

    Attributes:
        model: Run folder (its newest complete checkpoint is taken) or one ``step_...`` folder. Of a task: folder of
            ``megaprot finetune``, whose best model is taken (of several seeds all), or one of its models.
        data: Corpus: a folder of ``megaprot preprocess`` (its ``valid`` part is taken) or the prefix of one part, such
            as ``corpus/train``. Of a task: what ``megaprot finetune`` takes.
        task: ``mlm``: masked-language modelling with the masks of validation; ``unsupervised_contacts``: contacts from
            the attention of a run, checkpoint or Hugging Face folder; else the name or Python file of a task.
        split: Split of a task's data, such as ``test`` or ``cb513``; several with commas between, measured one by one.
        rows: Rows of a corpus to measure; 0 means all.
        output: JSON file for the numbers; empty prints only. Of a task: folder of ``results.json`` and
            ``report.html``, of several splits a folder each in it; empty: ``evaluation_SPLIT`` in the model's.
        max_tokens: Tokens of a task's batch; 0 takes the device's default.
        precision: Type of the weights of a task's model.
        parallel: Layout over processes of a checkpoint; any layout loads any checkpoint.
        check_processes: Validate for this many processes and exit; 0 evaluates.
    """

    model: str
    data: str
    task: str = "mlm"
    split: str = "test"
    rows: int = 0
    output: str = ""
    max_tokens: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    check_processes: int = 0


CONFIG = EvaluateConfig


def checkpoint_folder(model: Path) -> Path:
    """Return the complete checkpoint that ``model`` names: itself, or the newest one of a run folder."""
    from megaprot.pretrain import checkpoint

    if not model.is_dir():
        raise InputError(f"--model {model} is not a folder; name a run folder or one of its checkpoints.")
    if (model / checkpoint.STATE).is_file() or (model / MANIFEST).is_file():
        problem = checkpoint.problem_of(model) or damaged_file(model)
        if problem:
            raise InputError(f"the checkpoint {model} is not whole: {problem}; restore it or name another step.")
        return model
    newest = checkpoint.newest_complete(model / "checkpoints")
    if newest is None:
        raise InputError(f"{model} holds no checkpoint; name a run folder of megaprot pretrain or one of its steps.")
    return newest


def run(config: EvaluateConfig) -> None:
    """Evaluate as ``config`` says and print one line of numbers; under ``torchrun`` on all processes.

    Raises:
        InputError: Model or data are missing, damaged or do not fit each other.
    """
    if config.task == "mlm":
        _run_corpus(config)
    else:
        from megaprot.tools.evaluate_task import run_task

        run_task(config)


def _run_corpus(config: EvaluateConfig) -> None:
    """Evaluate a checkpoint of pretraining on a corpus."""
    quiet("megatron")
    quiet("torch.distributed")
    from megaprot.common.files import write_json_atomically
    from megaprot.pretrain import checkpoint, parallel
    from megaprot.pretrain.corpus import Corpus
    from megaprot.pretrain.evaluation import evaluate_checkpoint
    from megaprot.pretrain.validation import check_layout, check_model

    if config.rows < 0:
        raise InputError(f"--rows is {config.rows}; give 0 (all) or more.")
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise InputError(f"--output {config.output}: its folder does not exist; make it first.")
    folder = checkpoint_folder(Path(config.model))
    trained = checkpoint.read_config(folder)
    trained.parallel, trained.model.attention_backend = config.parallel, "auto"  # those of this machine, not of the run
    check_model(trained.model, trained.parallel)
    num_processes = config.check_processes or int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(trained, num_processes)
    prefix = Path(config.data) / "valid" if Path(config.data).is_dir() else Path(config.data)
    corpus = Corpus.open(prefix)
    corpus.verify_if_small()
    saved = checkpoint.read_vocabulary(folder)
    if saved != corpus.vocabulary:
        raise InputError(
            f"the corpus {prefix} has the vocabulary {corpus.vocabulary.name}, but {folder} has {saved.name}; "
            f"preprocess with --vocabulary {saved.name}."
        )
    if config.check_processes:
        print(f"model and data are valid for {num_processes} processes")
        return
    with parallel.processes(trained.parallel, trained.run.timeout_minutes) as place:
        numbers = evaluate_checkpoint(folder, trained, corpus, config.rows, place)
    if place.is_main:
        print(json.dumps({"model": str(folder), "data": str(prefix), **numbers}))
        if config.output:
            write_json_atomically(Path(config.output), {"model": str(folder), "data": str(prefix), **numbers})
