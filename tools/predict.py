"""Predict with a model of ``megaprot finetune``: any sequence file in, or pairs of proteins; a table out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megaprot.common.errors import InputError
from megaprot.common.quiet import quiet
from megaprot.common.sequence_readers import Columns

if TYPE_CHECKING:  # imported when used: `megaprot predict --help` does without
    from megaprot.finetune.model_folder import FinetunedModel
    from megaprot.finetune.processes import Place


@dataclass
class PredictConfig:
    """What ``megaprot predict`` can be told.

    Attributes:
        model: Folder of a run of ``megaprot finetune`` (its best model is taken) or of one of its models.
        output: Table to write, tab-separated.
        input: Sequences: FASTA, TAPE's files, tables, ... No labels are needed. For models of pairs give ``pairs`` or
            ``all_vs_all`` instead.
        pairs: Pairs to score: TSV of two names a line, or CSV with columns ``query`` and ``text`` of sequences.
        sequences: FASTA file of the proteins that ``pairs`` names.
        all_vs_all: FASTA file whose proteins are all paired with each other, or two, the one's with the other's.
        top_k: Of all pairs keep so many partners of each protein of the first file, best first; 0 any number.
        threshold: Of all pairs keep those of at least this probability; below 0 any.
        symmetric: Score both orders of a pair and average, where a model reads both proteins together.
        terms: Of a model of protein function: file of GO terms to score, one a line; ``all`` takes the whole ontology,
            empty those that training proteins have.
        text: Of a model of protein function: functions in words to score, instead of terms.
        top: Of a model of protein function: terms written for each protein, the likeliest first.
        cafa: Of a model of protein function: write CAFA's submission format.
        task: The task's Python file, if it is not one of those shipped.
        columns: Columns of the sequences in a table.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        precision: Type of the weights.
    """

    model: str
    output: str
    input: str = ""
    pairs: str = ""
    sequences: str = ""
    all_vs_all: list[str] = field(default_factory=list)
    top_k: int = 0
    threshold: float = -1.0
    symmetric: bool = True
    terms: str = ""
    text: list[str] = field(default_factory=list)
    top: int = 20
    cafa: bool = False
    task: str = ""
    columns: Columns = field(default_factory=Columns)
    max_tokens: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"


CONFIG = PredictConfig
_WEEK = 7 * 24 * 60.0
"""Minutes that the first process to end waits for the last."""


def run(config: PredictConfig) -> None:
    """Predict as ``config`` says; under ``torchrun`` on all processes.

    Raises:
        InputError: Model or input cannot be used.
    """
    quiet("torch.distributed")
    from megaprot.finetune.model_folder import find_model

    output = Path(config.output)
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its folder does not exist; make it first.")
    find_model(Path(config.model))
    is_of_pairs = bool(config.pairs or config.sequences or config.all_vs_all)
    if is_of_pairs == bool(config.input):
        raise InputError("give one of --input, --pairs and --all_vs_all.")
    _refuse_idle_flags(config, is_of_pairs)
    if is_of_pairs:
        _predict_pairs(config)
    else:
        _predict_proteins(config)


def _refuse_idle_flags(config: PredictConfig, is_of_pairs: bool) -> None:
    """Raise InputError for flags that this request would not look at."""
    if is_of_pairs and _has_function_flags(config):
        raise InputError("--terms, --text, --top and --cafa go with --input and a model of protein function; leave "
                         "them out.")  # fmt: skip
    if not is_of_pairs and (config.top_k or config.threshold >= 0 or not config.symmetric):
        raise InputError("--top_k, --threshold and --symmetric go with --pairs and --all_vs_all; leave them out.")


def _has_function_flags(config: PredictConfig) -> bool:
    """Tell whether anything is asked that only models of protein function answer."""
    return bool(config.terms or config.text or config.cafa or config.top != PredictConfig.top)


def _predict_pairs(config: PredictConfig) -> None:
    """Score pairs of proteins."""
    from megaprot.finetune.pairs.jobs import PairRequest, check_request
    from megaprot.finetune.pairs.prediction import predict_pairs
    from megaprot.finetune.processes import processes

    request = PairRequest(
        model=Path(config.model),
        output=Path(config.output),
        pairs=config.pairs,
        sequences=config.sequences,
        all_vs_all=tuple(config.all_vs_all),
        top_k=config.top_k,
        threshold=config.threshold,
        symmetric=config.symmetric,
        task=config.task,
        max_tokens=config.max_tokens,
        precision=config.precision,
    )
    check_request(request)
    with processes(_WEEK) as place:
        predict_pairs(request, place)


def _predict_proteins(config: PredictConfig) -> None:
    """Predict for single proteins."""
    from tqdm import tqdm

    from megaprot.common.files import atomic_write
    from megaprot.finetune.evaluation import run_split
    from megaprot.finetune.model_folder import read_model
    from megaprot.finetune.processes import processes

    output = Path(config.output)
    with processes(30.0) as place:
        tuned = read_model(Path(config.model), config.task, place.device, config.precision)
        if tuned.task.scores_terms:
            _predict_function(config, tuned, place)
            return
        if _has_function_flags(config):
            raise InputError(f"--terms, --text, --top and --cafa are of models of protein function; {config.model} "
                             f"predicts {tuned.task.name}.")  # fmt: skip
        examples = tuned.task.read_unlabelled(Path(config.input), tuned.encoder.vocabulary, config.columns)
        total = sum(map(tuned.task.num_residues, examples)) // place.world_size
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
        print(f"{output}: {tuned.task.name} of {len(examples):,} {tuned.task.unit}")


def _predict_function(config: PredictConfig, tuned: FinetunedModel, place: Place) -> None:
    """Predict terms, or functions in words."""
    from megaprot.finetune.examples import read_unlabelled
    from megaprot.finetune.function.prediction import FunctionRequest, predict

    request = FunctionRequest(config.terms, tuple(config.text), config.top, config.cafa, config.max_tokens)
    proteins = read_unlabelled(Path(config.input), tuned.encoder.vocabulary, config.columns)
    num_proteins = predict(tuned, proteins, Path(config.output), request, place)
    if place.is_main:
        print(f"{config.output}: {tuned.task.name} of {num_proteins:,} proteins")
