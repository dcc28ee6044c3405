"""Draw the training and validation loss of one or more runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.files import atomic_write
from megaprot.common.metrics_log import read_metrics, series


@dataclass
class PlotConfig:
    """What ``megaprot plot`` can be told.

    Attributes:
        run: Run folders, one pair of curves each.
        output: PNG, SVG or PDF file to write.
        baseline: Perplexity to draw as a level line over the validation perplexity, such as that of residue
            frequencies; 0 draws none.
    """

    run: list[str] = field(default_factory=list)
    output: str = "loss.png"
    baseline: float = 0.0


CONFIG = PlotConfig


def draw(runs: dict[str, list[dict[str, Any]]], output: Path, baseline: float) -> None:
    """Write the figure: loss by step on the left, perplexity on mask tokens on the right.

    Args:
        runs: Rows of ``metrics.jsonl`` by the run's name.
        output: File to write; its suffix chooses the format.
        baseline: Perplexity of the level line; 0 for none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (name, rows) in enumerate(runs.items()):
        colour, prefix = colours[number % len(colours)], f"{name} " if len(runs) > 1 else ""
        left.plot(*series(rows, "loss"), color=colour, alpha=0.5, linewidth=1, label=f"{prefix}training")
        left.plot(*series(rows, "validation_loss"), color=colour, marker="o", markersize=4, label=f"{prefix}validation")
        right.plot(
            *series(rows, "validation_mask_perplexity"), color=colour, marker="o", markersize=4, label=f"{prefix}model"
        )
    left.set(xlabel="optimizer step", ylabel="loss (nats a masked residue)", title="Loss")
    right.set(xlabel="optimizer step", ylabel="perplexity", title="Validation perplexity on mask tokens")
    if baseline and math.isfinite(baseline):
        right.axhline(
            baseline, color="black", linestyle="--", linewidth=1, label=f"residue frequencies ({baseline:.2f})"
        )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    with atomic_write(output) as stream:
        figure.savefig(stream, format=output.suffix[1:], dpi=130)
    pyplot.close(figure)


def run(config: PlotConfig) -> None:
    """Draw as ``config`` says.

    Raises:
        InputError: A run folder has no numbers, or the output's format is unknown.
    """
    output = Path(config.output)
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output {output} must end in .png, .svg or .pdf.")
    if not config.run:
        raise InputError("--run is not given; name one or more run folders of megaprot pretrain.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist; make it first.")
    runs, names = {}, [Path(folder).name for folder in config.run]
    for folder in map(Path, config.run):
        rows = read_metrics(folder / "metrics.jsonl")
        if not rows:
            raise InputError(f"{folder}/metrics.jsonl holds no numbers yet; name a run folder of megaprot pretrain.")
        runs[folder.name if names.count(folder.name) == 1 else str(folder)] = rows
    draw(runs, output, config.baseline)
    print(f"written to {output}")
