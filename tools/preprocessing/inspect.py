"""What a folder of corpora holds, in words, and the full check of its checksums."""

from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.pretrain.corpus import Corpus
from megaprot.tools.preprocessing.splits import SPLITS

_BAR_WIDTH = 40
_NUM_FAMILIES = 5


def open_folder(folder: Path) -> dict[str, Corpus]:
    """Return the corpora of a folder by split; raises InputError where there are none, or one is damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder: name one that `megaprot preprocess` wrote.")
    corpora = {name: Corpus.open(folder / name) for name in SPLITS if (folder / f"{name}.json").exists()}
    if not corpora:
        raise InputError(
            f"{folder}: holds no corpora (train.json and so on): name one that `megaprot preprocess` wrote."
        )
    return corpora


def verify(folder: Path) -> str:
    """Read all corpora of a folder whole; return a line for each. Raises InputError naming what is damaged."""
    lines = []
    for name, corpus in open_folder(folder).items():
        corpus.verify()
        num_bytes = sum(entry["num_bytes"] for entry in corpus.manifest["files"].values())
        lines.append(f"{folder / name}: whole, {corpus.num_sequences:,} sequences, {num_bytes:,} bytes read")
    return "\n".join(lines)


def describe(folder: Path) -> str:
    """Return what a folder of corpora holds: counts, lengths, families, vocabulary, sources, changes and splits."""
    corpora = open_folder(folder)
    lines = []
    for name, corpus in corpora.items():
        lines += [*_describe_split(name, corpus), ""]
    corpus = corpora.get("train") or next(iter(corpora.values()))
    return "\n".join([*lines, *_describe_origin(corpus)])


def _describe_split(name: str, corpus: Corpus) -> list[str]:
    unit = "residues" if corpus.vocabulary.is_per_residue else "tokens"
    lengths = corpus.lengths
    lines = [
        f"{name}: {corpus.num_sequences:,} sequences, {corpus.num_residues:,} {unit}, lengths {lengths.min():,} to "
        f"{lengths.max():,}, mean {corpus.num_residues / corpus.num_sequences:.1f}",
        *_histogram(corpus.manifest["length_histogram"], unit),
    ]
    families: dict[str, int] = corpus.manifest["families"]
    if families:
        largest = sorted(families.items(), key=lambda item: (-item[1], item[0]))[:_NUM_FAMILIES]
        lines.append(
            f"  families: {len(families):,}; the largest: " + ", ".join(f"{name} {count:,}" for name, count in largest)
        )
    if corpus.has_clusters:
        starts, _ = corpus.clusters
        lines.append(f"  clusters: {len(starts) - 1:,}")
    return lines


def _histogram(histogram: dict[str, list[int]], unit: str) -> list[str]:
    """Return one line a bin that is in use, or lies between two such."""
    edges, counts = histogram["edges"], histogram["counts"]
    used = [place for place, count in enumerate(counts) if count]
    lines = []
    for place in range(used[0], used[-1] + 1):
        until = f"{edges[place + 1] - 1:,}" if place + 1 < len(edges) else "more"
        bar = "#" * -(-counts[place] * _BAR_WIDTH // max(counts))
        lines.append(f"  {edges[place]:>6,} to {until:<6} {unit} {counts[place]:>13,} {bar}".rstrip())
    return lines


def _describe_origin(corpus: Corpus) -> list[str]:
    manifest = corpus.manifest
    lines = [
        f"vocabulary: {corpus.vocabulary.name}, {corpus.vocabulary.size:,} tokens, {corpus.dtype.itemsize} byte(s) each"
    ]
    for source in manifest["sources"]:
        counts = ", ".join(
            f"{source[f'num_{kind}']:,} {kind}"
            for kind in ("sequences", "skipped", "excluded", "duplicates")
            if source[f"num_{kind}"] or kind == "sequences"
        )
        lines.append(f"source: {source['path']}: {counts}; {source['num_bytes']:,} bytes, sha256 {source['sha256']}")
    if manifest["changes"]:
        lines.append("changed: " + ", ".join(f"{kind} {count:,}" for kind, count in manifest["changes"].items()))
    lines.append("splits: " + _shown_settings(manifest["split"]))
    lines.append(f"exact duplicates: {'removed' if manifest['deduplicated'] else 'kept'}")
    exclusion = manifest["exclusion"]
    for file in exclusion["files"]:
        lines.append(f"excluded: {file['path']}, sha256 {file['sha256']}")
    if exclusion["files"]:
        lines.append(
            f"excluded at identity {exclusion['identity']} by {exclusion['method']}: "
            f"{exclusion['num_removed']:,} sequences"
        )
    return lines


def _shown_settings(settings: dict[str, Any]) -> str:
    shown = {key: value for key, value in settings.items() if key != "name" and value not in ("", [])}
    return ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in shown.items())
