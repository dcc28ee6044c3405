"""Parts to corpora: duplicates dropped, splits assigned, each split's sequences gathered in the order of the input."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megaprot.common.content_hash import content_hashes
from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.block import NO_FAMILY
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.corpus import NO_CLUSTERS, Corpus, CorpusWriter, corpus_file
from megaprot.tools.preprocessing.deduplicate import Duplicates, SequenceColumns
from megaprot.tools.preprocessing.exclusion import REPORT_NAME, write_report
from megaprot.tools.preprocessing.kernels import gather
from megaprot.tools.preprocessing.parts import BLOCK_RECORDS, Part, PartBlock, pieces
from megaprot.tools.preprocessing.splits import SPLITS, Splitter

_NO_DUPLICATES = np.empty(0, dtype=np.bool_)


@dataclass(frozen=True)
class MergeSettings:
    """How parts become corpora; ``sources`` are the paths of the inputs, ``exclusion`` what the manifest says of it.

    ``old`` holds the corpora, by split, that the new ones begin with.
    """

    vocabulary: Vocabulary
    splitter: Splitter
    deduplicate: bool
    sources: list[str]
    exclusion: dict[str, Any]
    old: dict[str, Corpus]


@dataclass
class MergeResult:
    """What was written: by split a manifest's counts; ``changes`` and the others of all new input."""

    writers: dict[str, CorpusWriter] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    num_skipped: int = 0
    num_excluded: int = 0
    num_duplicates: int = 0
    bad_records: list[str] = field(default_factory=list)


def merge(parts: list[Part], settings: MergeSettings, output: Path, work: Path) -> MergeResult:
    """Write the corpora of all parts, in order, into ``output``; ``work`` is an empty folder for what is passing.

    Raises:
        InputError: where a split that was asked for gets no sequence.
        OSError: where something cannot be written.
    """
    result = MergeResult()
    splitter = settings.splitter
    with ExitStack() as stack:
        for name in splitter.names:
            result.writers[name] = CorpusWriter(output / name, settings.vocabulary)
            stack.callback(result.writers[name].close)
            if settings.old:
                _copy_old(settings.old[name], result.writers[name])
        duplicates = find_duplicates(parts, settings, work) if settings.deduplicate else [_NO_DUPLICATES] * len(parts)
        with ExitStack() as cluster_stack:
            cluster_files = {}
            if splitter.clusters is not None:
                cluster_files = {name: cluster_stack.enter_context(open(work / name, "wb")) for name in splitter.names}
            for part, is_duplicate in zip(parts, duplicates, strict=True):
                _add_part(part, is_duplicate, splitter, result.writers, cluster_files)
        check_splits(result.writers, splitter)
        of_source: list[list[tuple[Part, NDArray[np.bool_]]]] = [[] for _ in settings.sources]
        for part, is_duplicate in zip(parts, duplicates, strict=True):
            of_source[part.report.source].append((part, is_duplicate))
        sources = list(map(_source_entry, settings.sources, of_source))
        _sum_up(result, parts, sources)
        if settings.exclusion["files"]:
            old_reports = [corpus.prefix.with_name(REPORT_NAME) for corpus in list(settings.old.values())[:1]]
            new_reports = [part.folder / "excluded" for part in parts if part.report.num_excluded]
            write_report([*old_reports, *new_reports], output / REPORT_NAME)
        for name, writer in result.writers.items():
            keys = np.fromfile(work / name, dtype=np.uint64) if cluster_files else NO_CLUSTERS
            writer.finish(_provenance(name, settings, result, sources), keys)
    return result


def find_duplicates(parts: list[Part], settings: MergeSettings, work: Path) -> list[NDArray[np.bool_]]:
    """Return for each part which of its sequences equal an earlier one of the input or one of the old corpora."""
    columns = []
    for name, corpus in settings.old.items():
        _hash_old(corpus, work / f"{name}.hashes")
        hashes = np.memmap(work / f"{name}.hashes", dtype=np.uint64, mode="r").view(np.ndarray)
        ids = partial(np.memmap, corpus_file(corpus.prefix, ".bin"), dtype=corpus.dtype, mode="r")
        columns.append(SequenceColumns(ids, corpus.lengths, hashes))
    for part in parts:
        columns.append(SequenceColumns(partial(part.column, "ids"), part.column("lengths"), part.column("hashes")))
    duplicates = Duplicates(columns, work)
    return [duplicates.of_column(number) for number in range(len(settings.old), len(columns))]


def _hash_old(corpus: Corpus, path: Path) -> None:
    with open(path, "wb") as stream:
        for ids, lengths in _old_blocks(corpus):
            bounds = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))) * ids.dtype.itemsize
            stream.write(content_hashes(ids.view(np.uint8), bounds).data)


def _copy_old(corpus: Corpus, writer: CorpusWriter) -> None:
    """Begin a corpus with those of an old one, whose manifest tells the families."""
    for ids, lengths in _old_blocks(corpus):
        writer.add_block(ids, lengths, np.full(len(lengths), NO_FAMILY, dtype=np.int32))
    writer.families.update({int(name[2:]): count for name, count in corpus.manifest["families"].items()})


def _old_blocks(corpus: Corpus) -> Iterator[tuple[NDArray[Any], NDArray[np.int32]]]:
    """Yield ids and lengths of consecutive sequences."""
    offset = 0
    for start, end in pieces(corpus.lengths, BLOCK_RECORDS):
        lengths = corpus.lengths[start:end]
        num_ids = int(lengths.sum(dtype=np.int64))
        yield np.asarray(corpus.residues[offset : offset + num_ids]), lengths
        offset += num_ids


def _add_part(
    part: Part,
    is_duplicate: NDArray[np.bool_],
    splitter: Splitter,
    writers: dict[str, CorpusWriter],
    cluster_files: Mapping[str, BinaryIO],
) -> None:
    start = 0
    for block in part.blocks():
        end = start + len(block.lengths)
        _add_block(block, is_duplicate[start:end], splitter, writers, cluster_files)
        start = end


def _add_block(
    block: PartBlock,
    is_duplicate: NDArray[np.bool_],
    splitter: Splitter,
    writers: dict[str, CorpusWriter],
    cluster_files: Mapping[str, BinaryIO],
) -> None:
    splits = splitter.assign(block.hashes, block.families, block.identifiers)
    starts = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
    for name, writer in writers.items():
        is_here = splits == SPLITS.index(name)
        if len(is_duplicate):
            is_here &= ~is_duplicate
        if is_here.all():
            writer.add_block(block.ids, block.lengths, block.families)
        else:
            lengths = block.lengths[is_here]
            writer.add_block(gather(block.ids, starts[is_here], lengths), lengths, block.families[is_here])
        if cluster_files:
            cluster_files[name].write(splitter.cluster_keys(block.identifiers[is_here]).data)


def check_splits(writers: dict[str, CorpusWriter], splitter: Splitter) -> None:
    """Raise InputError for a split that was asked for and got no sequence."""
    config = splitter.config
    if not any(writer.num_sequences for writer in writers.values()):
        raise InputError(
            "no input file holds a sequence that can be used: all were skipped, excluded or duplicates of old ones."
        )
    for name, writer in writers.items():
        if writer.num_sequences:
            continue
        if name == "test" and config.hold_out and not config.test:
            raise InputError(
                f"no sequence of the input is among split.hold_out {', '.join(config.hold_out)}: correct it."
            )
        keys = {"random": "sequences", "family": "families", "clan": "clans", "cluster": "clusters"}[config.by]
        fraction = "lower split.valid and split.test" if name == "train" else f"raise split.{name}"
        raise InputError(f"split '{name}' got no sequence from so few {keys}: {fraction} or change split.seed.")


def _source_entry(path: str, parts: list[tuple[Part, NDArray[np.bool_]]]) -> dict[str, Any]:
    """Return what the manifest says of one input, which its ``parts``, each with its duplicates, were made of."""
    reports = [part.report for part, _ in parts]
    num_duplicates = int(sum(np.count_nonzero(is_duplicate) for _, is_duplicate in parts))
    return {
        "path": path,
        "num_bytes": sum(report.num_bytes for report in reports),
        "sha256": "".join(report.sha256 for report in reports),  # one part alone knows it
        "num_sequences": sum(report.num_sequences for report in reports) - num_duplicates,
        "num_skipped": sum(report.num_skipped for report in reports),
        "num_excluded": sum(report.num_excluded for report in reports),
        "num_duplicates": num_duplicates,
    }


def _sum_up(result: MergeResult, parts: list[Part], sources: list[dict[str, Any]]) -> None:
    for part in parts:
        result.changes.update(part.report.changes)
        result.bad_records += part.report.bad_records
    result.num_skipped = sum(source["num_skipped"] for source in sources)
    result.num_excluded = sum(source["num_excluded"] for source in sources)
    result.num_duplicates = sum(source["num_duplicates"] for source in sources)


def _provenance(
    name: str, settings: MergeSettings, result: MergeResult, sources: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the manifest says of where a corpus comes from, the corpora it begins with included."""
    changes, num_removed, is_deduplicated = Counter(result.changes), result.num_excluded, settings.deduplicate
    if settings.old:
        manifest = settings.old[name].manifest
        changes.update(manifest["changes"])
        sources = manifest["sources"] + sources
        num_removed += manifest["exclusion"]["num_removed"]
        is_deduplicated = is_deduplicated and manifest["deduplicated"]
    return {
        "changes": dict(sorted(changes.items())),
        "sources": sources,
        "split": {"name": name, **settings.splitter.settings()},
        "deduplicated": is_deduplicated,
        "exclusion": {**settings.exclusion, "num_removed": num_removed},
    }
