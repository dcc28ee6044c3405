"""A plan as a table, as JSON, and as the command line of its best layout."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megaprot.common.config_keys import config_keys
from megaprot.pretrain.config import PretrainConfig
from megaprot.tools.planning.gpus import GIB
from megaprot.tools.planning.planner import PARTS, Estimate, memory_words

_COLUMNS = (
    *("TP", "PP", "VPP", "SP", "DP", "row", "recompute", "GiB"),
    *("s/step", "tokens/s", "MFU %", "days", "GPU-hours"),
)


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        num_gpus: GPUs of the run.
        gpu: Their name.
        budget: Tokens to train on.
        price: Of a GPU for an hour; 0 for unknown.
        num_tried: Valid layouts.
        fit: Those that fit, the best first.
        asked: The configuration's own layout, None where it has none.
        command: Arguments that start the best layout.
    """

    num_gpus: int
    gpu: str
    budget: float
    price: float
    num_tried: int
    fit: list[Estimate]
    asked: Estimate | None
    command: list[str]

    def shown(self, show: int) -> list[Estimate]:
        """Return the best, then the fastest of each other tensor x pipeline size and row length, at most ``show``."""
        fastest: dict[tuple[int, int, int], Estimate] = {}
        for one in self.fit:
            parallel = one.config.parallel
            fastest.setdefault((parallel.tensor, parallel.pipeline, one.config.data.row_tokens), one)
        return list(fastest.values())[:show]

    def gpu_hours(self, one: Estimate) -> float:
        """Return the GPU-hours that ``one`` needs for the budget."""
        return one.days(self.budget) * 24.0 * self.num_gpus


def recipe_arguments(argv: Sequence[str]) -> list[str]:
    """Return the ``--config`` flags among ``argv``, with their values."""
    kept: list[str] = []
    taking = False
    for token in argv:
        if token.startswith("--"):
            taking = token == "--config" or token.startswith("--config=")
        if taking:
            kept.append(token)
    return kept


def _text_of(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _value(config: PretrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def command_line(base: PretrainConfig, best: PretrainConfig, argv: Sequence[str]) -> list[str]:
    """Return the arguments of ``megaprot`` that start ``best``: its recipes, then a flag for each key that differs.

    Args:
        base: What the recipes alone say.
        best: The run.
        argv: Arguments that name the recipes.
    """
    words = ["pretrain", *recipe_arguments(argv)]
    for name in config_keys(PretrainConfig):
        old, new = _value(base, name), _value(best, name)
        if old != new:
            words += [f"--{name}", *(_text_of(new) or ["[]"])]
    return words


def _row(plan: Plan, one: Estimate) -> list[str]:
    parallel, config = one.config.parallel, one.config
    return [
        str(parallel.tensor),
        str(parallel.pipeline),
        str(parallel.virtual_pipeline),
        "yes" if parallel.sequence else "no",
        str(one.data_size),
        str(config.data.row_tokens),
        config.train.recompute,
        f"{one.memory.total / GIB:.1f}",
        f"{one.time.total:.3f}",
        f"{one.tokens_per_second:,.0f}",
        f"{100 * one.mfu:.1f}",
        f"{one.days(plan.budget):.2f}",
        f"{plan.gpu_hours(one):,.0f}",
    ]


def as_text(plan: Plan, show: int) -> str:
    """Return the plan as a table of ``show`` layouts with the best one's memory, time and command."""
    best = plan.fit[0]
    rows = [list(_COLUMNS), *(_row(plan, one) for one in plan.shown(show))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        f"{len(plan.fit)} of {plan.num_tried} valid layouts fit {plan.num_gpus} x {plan.gpu}; predictions for "
        f"{plan.budget:.3g} tokens, fastest first after the best:",
        "",
        *("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows),
        "",
        f"best: {memory_words(best)}",
        "      seconds: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in asdict(best.time).items()),
    ]
    if plan.price:
        lines.append(f"      cost: {plan.price * plan.gpu_hours(best):,.0f}")
    if plan.asked is not None:
        state = f"does not fit (no room is left for {plan.asked.too_large})" if plan.asked.too_large else "fits"
        lines.append(
            f"the configuration's own layout {state}: {memory_words(plan.asked)}; {plan.asked.time.total:.3f} s a step"
        )
    return "\n".join([*lines, "", f"megaprot {shlex.join(plan.command)}"])


def _as_values(plan: Plan, one: Estimate) -> dict[str, Any]:
    return {
        "parallel": asdict(one.config.parallel),
        "data_parallel": one.data_size,
        "row_tokens": one.config.data.row_tokens,
        "global_batch_rows": one.config.train.global_batch_rows,
        "recompute": one.config.train.recompute,
        "fits": not one.too_large,
        "memory_bytes": {part: getattr(one.memory, part) for part in PARTS} | {"total": one.memory.total},
        "seconds": asdict(one.time) | {"total": one.time.total},
        "tokens_per_second": one.tokens_per_second,
        "mfu": one.mfu,
        "days": one.days(plan.budget),
        "gpu_hours": plan.gpu_hours(one),
        "cost": plan.price * plan.gpu_hours(one),
    }


def as_json(plan: Plan, show: int) -> dict[str, Any]:
    """Return the plan as plain values: sizes in bytes, times in seconds, the first ``show`` layouts."""
    return {
        "prediction": True,
        "gpus": plan.num_gpus,
        "gpu": plan.gpu,
        "tokens": plan.budget,
        "valid_layouts": plan.num_tried,
        "fitting_layouts": len(plan.fit),
        "layouts": [_as_values(plan, one) for one in plan.shown(show)],
        "asked": None if plan.asked is None else _as_values(plan, plan.asked),
        "command": ["megaprot", *plan.command],
    }
