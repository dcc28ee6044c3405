"""The figures of a report; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.metrics_log import series
from megaprot.finetune.pairs.metrics import NUM_BINS, bins_of, cumulated

_MOST_NAMED_CLASSES = 30


def scatter(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> Any:
    """Return predicted against measured numbers [num_proteins]; many points as densities."""
    figure, axes = _subplots(1)
    if len(measured) > 3000:
        shown = axes[0].hexbin(measured, predicted, gridsize=60, bins="log", cmap="viridis", mincnt=1)
        figure.colorbar(shown, ax=axes[0], label="proteins")
    else:
        axes[0].scatter(measured, predicted, s=6, alpha=0.5)
    low, high = float(min(measured.min(), predicted.min())), float(max(measured.max(), predicted.max()))
    axes[0].plot((low, high), (low, high), color="grey", linewidth=0.8)
    axes[0].set(xlabel="measured", ylabel="predicted")
    return figure


def confusion(counts: NDArray[np.float64], classes: Sequence[str]) -> Any:
    """Return a confusion matrix [true, predicted] as shares of each true class."""
    figure, axes = _subplots(1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = axes[0].imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axes[0])
    axes[0].set(xlabel="predicted", ylabel="true")
    if len(classes) <= _MOST_NAMED_CLASSES:
        axes[0].set_xticks(range(len(classes)), classes)
        axes[0].set_yticks(range(len(classes)), classes)
    if len(classes) <= 10:
        for row, column in np.ndindex(*shares.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes[0].text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=colour)
    return figure


def contact_maps(labels: NDArray[np.int64], chances: NDArray[np.floating]) -> Any:
    """Return true contacts and predicted probabilities [L, L] side by side."""
    figure, axes = _subplots(2)
    true = np.ma.masked_where(labels < 0, labels)
    axes[0].imshow(true, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    shown = axes[1].imshow(chances.astype(np.float32), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=list(axes), shrink=0.8, label="probability")
    axes[0].set(title="true", xlabel="residue", ylabel="residue")
    axes[1].set(title="predicted", xlabel="residue")
    return figure


def curves(rows: Sequence[dict[str, Any]], metric: str) -> Any:
    """Return training and validation loss, and the validation metric, by optimizer step."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _subplots(2)
    for key, label in (("loss", "training"), ("valid_loss", "validation")):
        axes[0].plot(*series(rows, key), label=label, marker="o" if key == "valid_loss" else None, markersize=3)
    for one in axes:
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="optimizer step", ylabel="loss")
    axes[0].legend(frameon=False)
    axes[1].plot(*series(rows, f"valid_{metric}"), marker="o", markersize=3)
    axes[1].set(xlabel="optimizer step", ylabel=f"validation {metric}")
    return figure


def ranking(labels: NDArray[np.float64], scores: Mapping[str, NDArray[np.float64]]) -> Any:
    """Return precision over recall and true over false positives of pairs [num_pairs], a line for each score."""
    figure, axes = _subplots(2)
    for name, values in scores.items():
        hits, errors = cumulated(labels, values)(np.ones(len(labels)))
        marker = "o" if len(hits) == 1 else ""  # one score for all pairs is a point, not a line
        axes[0].plot(hits / hits[-1], hits / (hits + errors), label=name, linewidth=1, marker=marker, clip_on=False)
        axes[1].plot(np.append(0.0, errors / errors[-1]), np.append(0.0, hits / hits[-1]), label=name, linewidth=1)
    axes[0].axhline(labels.mean(), color="grey", linewidth=0.8)
    axes[1].plot((0, 1), (0, 1), color="grey", linewidth=0.8)
    axes[0].set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes[1].set(xlabel="false positives", ylabel="true positives", xlim=(0, 1), ylim=(0, 1.02))
    axes[0].legend(frameon=False)
    return figure


def reliability(labels: NDArray[np.float64], unscaled: NDArray[np.float64], scaled: NDArray[np.float64]) -> Any:
    """Return the share of pairs that bind over the probability they were given, before and after scaling."""
    figure, axes = _subplots(2)
    for name, values in (("as given", unscaled), ("scaled", scaled)):
        bins = bins_of(values)
        counts = np.bincount(bins, minlength=NUM_BINS)
        used = counts > 0
        means = [np.bincount(bins, those, NUM_BINS)[used] / counts[used] for those in (values, labels)]
        axes[0].plot(*means, marker="o", markersize=3, label=name)
        axes[1].stairs(counts, np.linspace(0, 1, NUM_BINS + 1), label=name)
    axes[0].plot((0, 1), (0, 1), color="grey", linewidth=0.8)
    axes[0].set(xlabel="probability", ylabel="share that binds", xlim=(0, 1), ylim=(0, 1))
    axes[1].set(xlabel="probability", ylabel="pairs")
    axes[0].legend(frameon=False)
    return figure


def _subplots(columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes, drawn without a display and outside pyplot's list of open figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.8), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
