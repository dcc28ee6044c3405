"""One fine-tuning run, or a grid of them over settings and seeds, and what they come to together."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaprot.common.command_line import parse_config
from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically
from megaprot.common.stopping import StopRequest, leave_marker, remove_marker
from megaprot.finetune.checks import check_config
from megaprot.finetune.config import FinetuneConfig
from megaprot.finetune.evaluate import Request, described, evaluate
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.model_folder import RUNS
from megaprot.finetune.processes import Place
from megaprot.finetune.splits import prepare
from megaprot.finetune.task import Task
from megaprot.finetune.training import (
    Run,
    RunResult,
    check_resumption,
    train,
)


@dataclass(frozen=True)
class Planned:
    """One run of a grid.

    Attributes:
        name: Its folder in the output; empty where the output is its folder.
        setting: What the sweep set; empty without one.
        config: Its configuration.
    """

    name: str
    setting: str
    config: FinetuneConfig


@dataclass(frozen=True)
class Plan:
    """What is to be run, and the data all runs read.

    Attributes:
        output: Folder of all of it.
        runs: The runs.
        task: What is learned.
        train: Training split.
        valid: Validation split.
    """

    output: Path
    runs: list[Planned]
    task: Task
    train: list[Any]
    valid: list[Any]


def check(config: FinetuneConfig) -> Plan:
    """Return what a configuration asks for, with model and data opened.

    Raises:
        InputError: Something is wrong with the configuration, the model, the data or a save to go on from.
    """
    runs = _grid(config)
    for planned in runs:
        check_config(planned.config)
    encoder = load_encoder(Path(config.model))
    task, train_examples, valid_examples = prepare(config, encoder)
    for planned in runs:
        task.head_name(planned.config.head)
        check_resumption(planned.config, task, train_examples)
    return Plan(Path(config.output), runs, task, train_examples, valid_examples)


def _grid(config: FinetuneConfig) -> list[Planned]:
    """Return the runs of all settings and seeds."""
    axes = [_axis(text) for text in config.sweep]
    found = []
    for chosen in itertools.product(*axes):
        setting = " ".join(f"{key}={value}" for key, value in chosen)
        swept = _overridden(replace(config, sweep=[], seeds=1), chosen)
        for seed in range(config.seed, config.seed + max(1, config.seeds)):
            parts = [*(f"{key.split('.')[-1]}_{value}" for key, value in chosen)]
            parts += [f"seed_{seed}"] if config.seeds > 1 else []
            name = "-".join(parts).replace("/", "_")
            run = replace(copy.deepcopy(swept), seed=seed, output=str(Path(config.output) / name))
            found.append(Planned(name, setting, run))
    if len({planned.name for planned in found}) < len(found):
        raise InputError("--sweep names a setting twice; name each value once.")
    return found


def _axis(text: str) -> list[tuple[str, str]]:
    """Return [(key, value), ...] of one key of the grid."""
    key, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise InputError(f"--sweep {text}: write a key and its values, such as optim.lr=1e-4,3e-4.")
    if key.split(".")[0] in ("task", "model", "data", "output", "sweep", "seeds", "seed", "check_processes"):
        raise InputError(f"--sweep {key}: sweep over settings of head, tuning, optim, train or engine.")
    if key in ("train.train_examples", "train.valid_examples") or key.startswith("labels."):
        raise InputError(f"--sweep {key}: all runs of a grid read the same data; run them one by one.")
    return [(key, value) for value in values.split(",")]


def _overridden(config: FinetuneConfig, chosen: tuple[tuple[str, str], ...]) -> FinetuneConfig:
    """Return a configuration with other values for some keys, checked as flags are."""
    if not chosen:
        return config
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.yaml"
        base.write_text(config_to_yaml(config), encoding="utf-8")
        flags = [part for key, value in chosen for part in (f"--{key}", value)]
        return parse_config(FinetuneConfig, ["--config", str(base), *flags], program="sweep", description="")


def take(plan: Plan, place: Place) -> None:
    """Take the runs one after another; with several, write what they come to together; all ranks call it.

    A signal ends the run that is on and the whole, with a marker in the output's folder: the same command goes on.
    """
    stop = StopRequest()
    results = []
    for planned in plan.runs:
        if place.is_main and planned.name:
            print(f"run {planned.name}", flush=True)
        task = copy.copy(plan.task)  # what it has read is shared
        task.configure(planned.config)
        task.learn(plan.train, planned.config.head)
        run = Run(planned.config, task, plan.train, plan.valid, place)
        if place.is_main:
            remove_marker(plan.output)
        results.append(train(run, stop))
        del run
        if not results[-1].is_finished:
            if place.is_main and results[-1].was_stopped:
                leave_marker(plan.output, results[-1].num_steps)
            return
    if place.is_main and plan.runs[0].name:
        summary = summarised(plan, results)
        write_json_atomically(plan.output / RUNS, summary)
        print(*described(summary), sep="\n  ")
    place.barrier()
    config = plan.runs[0].config
    request = Request(config.task, plan.output, Path(config.data), ("valid",), str(plan.output), 0, "fp32")
    for _ in evaluate(request, place):
        pass
    if place.is_main:
        print(f"{plan.output}/report.html shows the validation split; megaprot evaluate measures others")


def summarised(plan: Plan, results: list[RunResult]) -> dict[str, Any]:
    """Return mean and spread of the best validation metric by setting, and the best setting."""
    by_setting: dict[str, list[tuple[str, RunResult]]] = {}
    for planned, result in zip(plan.runs, results, strict=True):
        by_setting.setdefault(planned.setting, []).append((planned.name, result))
    settings = []
    for setting, runs in by_setting.items():
        values = [result.best_value for _, result in runs]
        finite = [value for value in values if math.isfinite(value)]
        settings.append({
            "setting": setting,
            "runs": [name for name, _ in runs],
            "values": [value if math.isfinite(value) else None for value in values],
            "mean": statistics.fmean(finite) if finite else None,
            "standard_deviation": statistics.stdev(finite) if len(finite) > 1 else None,
        })  # fmt: skip
    sign = 1 if plan.task.higher_is_better else -1
    settings.sort(key=lambda one: -sign * one["mean"] if one["mean"] is not None else math.inf)
    return {"task": plan.task.name, "metric": f"valid_{plan.task.metric}", "settings": settings,
            "best_runs": settings[0]["runs"]}  # fmt: skip
