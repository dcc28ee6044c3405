"""Evaluate a fine-tuned model, or all seeds of one, on splits, and write the reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaprot.common.metrics_log import read_metrics
from megaprot.finetune import figures
from megaprot.finetune.evaluation import Evaluated, run_split, split_metrics
from megaprot.finetune.metrics import NUM_SAMPLES, Metric
from megaprot.finetune.model_folder import FinetunedModel, models_of, read_grid, read_model
from megaprot.finetune.processes import Place
from megaprot.finetune.report import Report, write_report


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        task: Name or Python file of the task.
        model: Folder of a run, of one of its models, or of a grid of runs.
        data: As for fine-tuning.
        splits: Which splits, measured one by one.
        output: Folder of the report, of several splits a folder each in it; empty: ``evaluation_SPLIT`` in the model's.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        precision: Type of the weights.
    """

    task: str
    model: Path
    data: Path
    splits: tuple[str, ...]
    output: str
    max_tokens: int
    precision: str


def evaluate(request: Request, place: Place) -> Iterator[dict[str, Any]]:
    """Evaluate as asked and write the reports; all ranks go through it. Yield rank 0's ``results.json`` of each split.

    Each model is read once. With several seeds a metric's value is the mean over them, its interval the mean of theirs,
    and ``standard_deviation`` their spread.
    """
    folders = models_of(request.model)
    found: dict[str, list[dict[str, Metric]]] = {split: [] for split in request.splits}
    reports: dict[str, Report] = {}
    for folder in folders:
        tuned = read_model(folder, request.task, place.device, request.precision)
        for split in request.splits:
            examples = read_split(tuned, request.data, split)
            evaluated = _predicted(tuned, examples, split, request.max_tokens, place)
            if not place.is_main:
                continue
            found[split].append(split_metrics(tuned.task, examples, evaluated, NUM_SAMPLES))
            if folder == folders[0]:  # at once: what a task has read last is what it reports of
                reports[split] = _report(request, split, tuned, folders, examples, evaluated)
            if folder == folders[-1]:
                details = _details(request, folders, found[split])
                yield _written(request, replace(reports[split], metrics=averaged(found[split]), details=details))


def _report(
    request: Request,
    split: str,
    tuned: FinetunedModel,
    folders: Sequence[Path],
    examples: Sequence[Any],
    evaluated: Evaluated,
) -> Report:
    """Return what is reported of a split, but for the metrics of all seeds."""
    return Report(
        task=tuned.task.name,
        split=split,
        num_examples=len(examples),
        metrics={},
        definitions=tuned.task.definitions(),
        unit=tuned.task.unit,
        about=_about(request, split, tuned, folders, evaluated),
        figures=[*_curves(folders[0], tuned), *tuned.task.figures(examples, evaluated.outcomes)],
        details={},
        sections=tuned.task.sections(examples, evaluated.outcomes),
    )


def _written(request: Request, report: Report) -> dict[str, Any]:
    """Write a report; return its folder and ``results.json``."""
    output = Path(request.output) if request.output else request.model / f"evaluation_{report.split}"
    if request.output and len(request.splits) > 1:
        output /= report.split
    write_report(output, report)
    return {"output": str(output), **json.loads((output / "results.json").read_text(encoding="utf-8"))}


def read_split(tuned: FinetunedModel, data: Path, split: str) -> list[Any]:
    """Return a split's examples with labels that fit the model; raises InputError where they do not."""
    place = tuned.task.place_of(data, split)
    examples = tuned.task.read(data, split, tuned.encoder.vocabulary)
    tuned.task.check(examples, place)
    return examples


def _predicted(tuned: FinetunedModel, examples: Sequence[Any], split: str, max_tokens: int, place: Place) -> Evaluated:
    total = sum(map(tuned.task.num_residues, examples)) // place.world_size
    hidden = None if place.is_main else True
    with tqdm(total=total, desc=split, unit="res", unit_scale=True, disable=hidden) as progress:
        return run_split(tuned.task, tuned.encoder, tuned.model, examples, place, max_tokens, told=progress.update)


def averaged(found: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Return each metric's mean over models, and the mean of its interval's ends."""
    return {
        name: Metric(
            *(statistics.fmean(getattr(one[name], part) for one in found) for part in ("value", "low", "high"))
        )
        for name in found[0]
    }


def _details(request: Request, folders: Sequence[Path], found: Sequence[dict[str, Metric]]) -> dict[str, Any]:
    """Return what ``results.json`` holds beside the metrics."""
    details: dict[str, Any] = {"models": [str(folder) for folder in folders], "data": str(request.data)}
    if len(found) > 1:
        values = {name: [one[name].value for one in found] for name in found[0]}
        details["values_by_model"] = values
        details["standard_deviation"] = {name: statistics.stdev(those) for name, those in values.items()}
    return details


def _about(
    request: Request, split: str, tuned: FinetunedModel, folders: Sequence[Path], evaluated: Evaluated
) -> list[str]:
    """Return the report's first lines."""
    description = tuned.description
    lines = [
        f"Model {', '.join(map(str, folders))}, head {description['head']['name']}, step {description.get('step')}; "
        f"data {request.data}, split {split}.",
        f"Mean loss {evaluated.loss:.4f}. None of the split's {tuned.task.unit} was left out.",
    ]
    if len(folders) > 1:
        lines.append(f"Values are means over {len(folders)} seeds; figures and later tables are those of the first.")
    return lines + described(read_grid(request.model))


def described(grid: dict[str, Any]) -> list[str]:
    """Return what the runs of a grid came to as lines, best setting first; none without a grid."""
    if not grid:
        return []
    lines = [f"{grid['metric']} of the best validation, mean and standard deviation over seeds:"]
    for one in grid["settings"]:
        mean = "nan" if one["mean"] is None else f"{one['mean']:.4f}"
        spread = "" if one["standard_deviation"] is None else f" ± {one['standard_deviation']:.4f}"
        lines.append(f"{mean}{spread}  {one['setting'] or 'all settings as given'}  ({len(one['runs'])} runs)")
    return lines


def _curves(folder: Path, tuned: FinetunedModel) -> list[tuple[str, Any]]:
    """Return the curves of the run a model came from, if its log is there."""
    rows = read_metrics(folder.parent / "metrics.jsonl")
    return [("Training", figures.curves(rows, tuned.task.metric))] if rows else []
