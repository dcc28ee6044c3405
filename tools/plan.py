"""Find the layouts of a pretraining run that fit some GPUs, and predict memory, step time, days and cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megaprot.common.command_line import parse_config, run_command
from megaprot.common.errors import InputError
from megaprot.common.quiet import quiet
from megaprot.pretrain.__main__ import RECIPES
from megaprot.pretrain.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
)
from megaprot.tools.planning.gpus import GpuFigures, gpu_of
from megaprot.tools.planning.search import SearchConfig, check_search


@dataclass
class PlanConfig:
    """What ``megaprot plan`` can be told: every section of a pretraining run, and what it is to run on.

    Attributes:
        gpus: GPUs of the run.
        gpu: Which: a name, or ``own`` with all of ``figures``.
        figures: Figures in place of the data sheet's.
        search: What is tried.
        tokens: Tokens to train on; 0 means ``train.num_steps`` batches.
        price: Price of a GPU for an hour, in any currency; 0 gives GPU-hours only.
        vocabulary_size: Tokens of the vocabulary.
        attended: Tokens that a token attends to: the sum of squared sequence lengths over the sum of lengths.
        check: Only check the layout of ``parallel``: exit status 2 and the nearest that fits where it cannot.
        show: Layouts listed.
        scaling: PNG, SVG or PDF file for predicted weak and strong scaling of the best layout; empty draws none.
        json: Print JSON.
        model: As in ``megaprot pretrain``, like the other sections.
        parallel: Its layout is reported first where it differs from the default; ``overlap_communication`` is kept.
        data: Corpus and rows; the corpus is not read.
        optim: Not looked at.
        train: Batch, precision and length.
        run: Not looked at.
        check_processes: Not looked at; the configuration that a run saves has it.
    """

    gpus: int
    gpu: Literal["a100-40", "a100-80", "h100", "h200", "b200", "b300", "own"] = "h100"
    figures: GpuFigures = field(default_factory=GpuFigures)
    search: SearchConfig = field(default_factory=SearchConfig)
    tokens: float = 0.0
    price: float = 0.0
    vocabulary_size: int = 33
    attended: float = 512.0
    check: bool = False
    show: int = 10
    scaling: str = ""
    json: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    check_processes: int = 0

    @property
    def pretraining(self) -> PretrainConfig:
        """The run that is planned."""
        return PretrainConfig(self.model, self.parallel, self.data, self.optim, self.train, self.run)

    @property
    def budget(self) -> float:
        """Tokens to train on."""
        return self.tokens or float(self.train.num_steps * self.train.global_batch_rows * self.data.row_tokens)


def check_numbers_of(config: PlanConfig) -> None:
    """Raise InputError for numbers no plan can have."""
    for name in ("gpus", "vocabulary_size", "attended", "show"):
        if getattr(config, name) <= 0:
            raise InputError(f"--{name} is {getattr(config, name)}; give a number above 0.")
    for name in ("tokens", "price"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name} is {getattr(config, name)}; give 0 or more.")
    scaling = Path(config.scaling)
    if config.scaling and scaling.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--scaling {scaling} must end in .png, .svg or .pdf.")
    if config.scaling and not scaling.absolute().parent.is_dir():
        raise InputError(f"--scaling {scaling}: its folder does not exist; make it first.")
    check_search(config.search)


def run(config: PlanConfig, argv: Sequence[str]) -> None:
    """Plan as ``config`` says and print a table or JSON.

    Args:
        config: What is planned.
        argv: The arguments it was read from; the printed command repeats their recipes.

    Raises:
        InputError: Nothing fits, or the configuration is wrong.
    """
    quiet("megatron")
    from megaprot.tools.planning import planner, report, scaling

    check_numbers_of(config)
    gpu, wanted = gpu_of(config.gpu, config.figures), config.pretraining
    facts = (config.vocabulary_size, config.attended)
    if config.check:
        asked = planner.refuse_unless_fits(wanted, config.gpus, gpu, *facts)
        print(f"the layout fits: {planner.memory_words(asked)}")
        return
    if config.train.precision == "fp32":
        raise InputError("train.precision is fp32, but rates are known for bf16 and fp16 only; plan with one of those.")
    found = planner.estimates(wanted, config.gpus, gpu, *facts, config.search)
    fit = planner.simplest_first(planner.fitting(found), wanted)
    best = fit[0]
    plain = replace(ParallelConfig(), overlap_communication=config.parallel.overlap_communication)
    asked_for = None if config.parallel == plain else planner.estimate_of(wanted, config.gpus, gpu, *facts)
    base = parse_config(
        PretrainConfig, report.recipe_arguments(argv), program="megaprot plan", description="", recipes=RECIPES
    )
    command = report.command_line(base, best.config, argv)
    listed = report.Plan(config.gpus, config.gpu, config.budget, config.price, len(found), fit, asked_for, command)
    if config.json:
        print(json.dumps(report.as_json(listed, config.show), indent=2))
    else:
        print(report.as_text(listed, config.show))
    if config.scaling:
        points = scaling.scaling_points(best, config.vocabulary_size, config.attended)
        scaling.draw(points, best, Path(config.scaling))


def main(argv: list[str]) -> int:
    """Read the arguments, plan, and return the exit status."""
    description = (__doc__ or "").strip().split("\n")[0]

    def parse_and_run() -> None:
        run(parse_config(PlanConfig, argv, program="megaprot plan", description=description, recipes=RECIPES), argv)

    return run_command("megaprot plan", parse_and_run)
