"""Predict with a model of ``megaprot finetune``: any sequence file in, a table out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megaprot.common.errors import InputError
from megaprot.common.quiet import quiet
from megaprot.common.sequence_readers import Columns


@dataclass
class PredictConfig:
    """What ``megaprot predict`` can be told.

    Attributes:
        model: Folder of a run of ``megaprot finetune`` (its best model is taken) or of one of its models.
        input: Sequences: FASTA, TAPE's files, tables, ... No labels are needed.
        output: Table to write, tab-separated.
        task: The task's Python file, if it is not one of those shipped.
        columns: Columns of the sequences in a table.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        precision: Type of the weights.
    """

    model: str
    input: str
    output: str
    task: str = ""
    columns: Columns = field(default_factory=Columns)
    max_tokens: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"


CONFIG = PredictConfig


def run(config: PredictConfig) -> None:
    """Predict as ``config`` says; under ``torchrun`` on all processes.

    Raises:
        InputError: Model or input cannot be used.
    """
    quiet("torch.distributed")
    from tqdm import tqdm

    from megaprot.common.files import atomic_write
    from megaprot.finetune.evaluation import run_split
    from megaprot.finetune.examples import read_unlabelled
    from megaprot.finetune.model_folder import find_model, read_model
    from megaprot.finetune.processes import processes

    output = Path(config.output)
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its folder does not exist; make it first.")
    find_model(Path(config.model))
    with processes(30.0) as place:
        tuned = read_model(Path(config.model), config.task, place.device, config.precision)
        examples = list(read_unlabelled(Path(config.input), tuned.encoder.vocabulary, config.columns))
        total = sum(len(example.residues) for example in examples) // place.world_size
        hidden = None if place.is_main else True
        with tqdm(total=total, desc="predict", unit="res", unit_scale=True, disable=hidden) as progress:
            found = run_split(
                tuned.task, tuned.encoder, tuned.model, examples, place, config.max_tokens, False, progress.update
            )
        if not place.is_main:
            return
        text = io.StringIO()
        table = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        table.writerow(("identifier", *tuned.task.columns()))
        for example, outcome in zip(examples, found.outcomes, strict=True):
            table.writerows((example.identifier, *cells) for cells in tuned.task.rows(example, outcome))
        with atomic_write(output) as stream:
            stream.write(text.getvalue().encode())
        print(f"{output}: {tuned.task.name} of {len(examples):,} proteins")
