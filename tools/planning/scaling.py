"""Predicted weak and strong scaling of a layout to thousands of GPUs, as a figure and a table beside it."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

from megaprot.common.files import atomic_write
from megaprot.tools.planning.planner import Estimate, estimate

MOST_GPUS = 8192


@dataclass(frozen=True)
class ScalingPoint:
    """One number of GPUs.

    Attributes:
        kind: ``strong``: the batch stays. ``weak``: it grows with the GPUs.
        num_gpus: GPUs.
        tokens_per_second: Predicted rate over all of them.
        efficiency: Rate a GPU over that of the smallest number drawn.
    """

    kind: str
    num_gpus: int
    tokens_per_second: float
    efficiency: float


def scaling_points(best: Estimate, vocabulary_size: int, attended: float) -> list[ScalingPoint]:
    """Return predictions from one copy of the layout's model upwards, doubling its data-parallel size.

    Tensor and pipeline sizes, rows and recomputation stay. Strong scaling ends where the batch cannot be dealt.

    Args:
        best: The layout, with its batch.
        vocabulary_size: Tokens of the vocabulary.
        attended: Tokens that a token attends to, on average.
    """
    config = best.config
    model_size, batch = config.parallel.tensor * config.parallel.pipeline, config.train.global_batch_rows
    group = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
    rows_a_copy = batch // best.data_size
    points: list[ScalingPoint] = []
    for kind in ("strong", "weak"):
        data_size, first = 1, 0.0
        while model_size * data_size <= MOST_GPUS:
            rows = batch if kind == "strong" else rows_a_copy * data_size
            if rows % (data_size * group):
                break
            run = replace(config, train=replace(config.train, global_batch_rows=rows))
            rate = estimate(run, data_size, best.gpu, vocabulary_size, attended).tokens_per_second
            num_gpus = model_size * data_size
            first = first or rate / num_gpus
            points.append(ScalingPoint(kind, num_gpus, rate, rate / num_gpus / first))
            data_size *= 2
    return points


def draw(points: list[ScalingPoint], best: Estimate, output: Path) -> None:
    """Write the figure ``output`` and its numbers beside it as ``.csv``; both say that they are predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    for kind, marker in (("strong", "o"), ("weak", "s")):
        chosen = [point for point in points if point.kind == kind]
        axes.plot(
            [point.num_gpus for point in chosen],
            [point.tokens_per_second for point in chosen],
            marker=marker,
            label=f"{kind} scaling",
        )
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens a second", title="Predicted, not measured")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(output) as stream:
        figure.savefig(stream, format=output.suffix[1:], dpi=130)
    pyplot.close(figure)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["kind", "gpus", "predicted_tokens_per_second", "predicted_efficiency"])
    for point in points:
        writer.writerow([point.kind, point.num_gpus, round(point.tokens_per_second), round(point.efficiency, 4)])
    with atomic_write(output.with_suffix(".csv")) as stream:
        stream.write(table.getvalue().encode())
