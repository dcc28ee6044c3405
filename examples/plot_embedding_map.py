"""Draw protein domains on the first two principal components of their embeddings, coloured by Pfam clan.

usage: python examples/plot_embedding_map.py EMBEDDINGS.h5 FASTA CLANS.tsv OUTPUT.png

EMBEDDINGS.h5 is what ``megaprot embed`` made of FASTA, a cut of Pfam-A.fasta; CLANS.tsv has rows of Pfam-A.clans.tsv.
"""

import sys
from collections import Counter
from pathlib import Path

import h5py
import matplotlib
import numpy as np
from numpy.typing import NDArray

from megaprot.common.sequence_readers import open_sequences

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = ("#1b6ca8", "#e07b00", "#2a9d4b", "#c9302c", "#8559a5", "#00a6a6", "#e377c2", "#6b4226")
REST = "0.85"


def clans_by_identifier(fasta: str, table: Path) -> dict[str, str]:
    """Return the clan's name of each domain, or its family's where that is in no clan."""
    names = {}
    for line in table.read_text().splitlines():
        family, _, clan, short_name, *_ = line.split("\t")
        names[family] = clan or short_name
    return {record.identifier: names[record.family] for record in open_sequences(fasta)}


def principal_components(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first two principal components [num_proteins, 2] and the share of the variance each explains."""
    standard = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0).clip(1e-12)
    variances, directions = np.linalg.eigh(np.cov(standard, rowvar=False, dtype=np.float64))
    return standard @ directions[:, [-1, -2]], variances[[-1, -2]] / variances.sum()


def main() -> None:
    """Draw the map."""
    embeddings, fasta, table, output = sys.argv[1:5]
    clans = clans_by_identifier(fasta, Path(table))
    with h5py.File(embeddings) as file:
        found = [(dataset.attrs.get("original_id", key), dataset[:]) for key, dataset in file.items()]
    labels = np.array([clans[identifier] for identifier, _ in found])
    points, shares = principal_components(np.stack([vector for _, vector in found]).astype(np.float32))

    figure, axes = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    most = [clan for clan, _ in Counter(labels.tolist()).most_common(len(COLOURS))]
    is_rest = ~np.isin(labels, most)
    axes.scatter(*points[is_rest].T, s=4, color=REST, linewidths=0, label=f"other ({is_rest.sum():,})")
    order = np.random.default_rng(0).permutation(np.flatnonzero(~is_rest))  # no clan hides the others
    colours = dict(zip(most, COLOURS, strict=False))
    axes.scatter(*points[order].T, s=6, c=[colours[label] for label in labels[order]], linewidths=0)
    for clan in most:
        axes.scatter([], [], s=30, color=colours[clan], label=f"{clan} ({(labels == clan).sum():,})")
    low, high = np.percentile(points, [0.1, 99.9], axis=0)  # a few far domains do not squeeze the rest
    margin = 0.05 * (high - low)
    axes.set(
        xlim=(low[0] - margin[0], high[0] + margin[0]),
        ylim=(low[1] - margin[1], high[1] + margin[1]),
        xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
        ylabel=f"second principal component ({shares[1]:.0%})",
        title=f"Mean embeddings of {len(labels):,} Pfam domains by clan",
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)
    figure.savefig(output, dpi=130)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
