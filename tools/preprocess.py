"""``megaprot preprocess``: sequence files to the training, validation and test corpora of one output folder.

The input is cut into units, workers turn each into a part (encoded sequences and columns), and the parts are merged
into corpora. Neither the number of workers nor of shards changes a byte of the result.
"""

import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import folder_written_whole
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.corpus import FORMAT_VERSION
from megaprot.tools.preprocessing import inspect, shards
from megaprot.tools.preprocessing.append import open_old
from megaprot.tools.preprocessing.config import ExcludeConfig, PreprocessConfig, SplitConfig
from megaprot.tools.preprocessing.exclusion import read_excluded
from megaprot.tools.preprocessing.merge import MergeResult, MergeSettings, merge
from megaprot.tools.preprocessing.parts import NUM_SHOWN_BAD_RECORDS, Part, PartSettings
from megaprot.tools.preprocessing.splits import Splitter, needs_identifiers
from megaprot.tools.preprocessing.units import STANDARD_INPUT, Unit, check_inputs, describe_sources, plan_units
from megaprot.tools.preprocessing.workers import sigterm_cleans_up, write_parts

__all__ = ["CONFIG", "ExcludeConfig", "PreprocessConfig", "SplitConfig", "run"]

CONFIG = PreprocessConfig


def run(config: PreprocessConfig) -> None:
    """Write corpora and print a summary, or look at some; see :class:`PreprocessConfig`.

    Raises:
        InputError: for wrong settings or input; RunError where the output cannot be written. Neither leaves a folder.
    """
    if config.inspect or config.verify:
        if config.inspect:
            print(inspect.describe(Path(config.inspect)))
        if config.verify:
            print(inspect.verify(Path(config.verify)))
        return
    if not config.output:
        raise InputError("output names no folder: give --output FOLDER for the corpora.")
    if config.workers < 1:
        raise InputError(f"workers is {config.workers}: give a number of processes from 1.")
    if config.merge and config.shard:
        raise InputError("shard and merge exclude each other: run all shards, then merge once.")
    try:
        with sigterm_cleans_up():
            if config.merge:
                _merge_shards(config)
            elif config.shard:
                _write_shard(config)
            else:
                _write_corpora(config)
    except OSError as error:
        raise RunError(
            f"{error.filename or config.output}: could not be read or written ({error.strerror}): "
            "make room or choose another folder."
        ) from None


@dataclass(frozen=True)
class _Plan:
    """The work: all units, what parts are made with, and what shards must share of it (plain values)."""

    units: list[Unit]
    parts: PartSettings
    description: dict[str, Any]


def _plan(config: PreprocessConfig) -> _Plan:
    vocabulary = get_vocabulary(config.vocabulary)
    check_inputs(config.input, config.format)
    units = plan_units(config.input, config.format)
    excluded, exclusion = None, no_exclusion(config.exclude)
    if config.exclude.files:
        excluded, exclusion = read_excluded(config.exclude, vocabulary)
    parts = PartSettings(
        vocabulary=vocabulary,
        format=config.format,
        columns=config.columns,
        split_by=config.split.by,
        keep_identifiers=needs_identifiers(config.split),
        is_stopping=config.on_bad_record == "stop",
        excluded=excluded,
    )
    description = {
        **config.content_settings(),
        "sources": describe_sources(config.input),
        "num_units": len(units),
        "exclusion": exclusion,
        "format_version": FORMAT_VERSION,
        "vocabulary_content": vocabulary.to_dict(),
    }
    return _Plan(units, parts, description)


def no_exclusion(config: ExcludeConfig) -> dict[str, Any]:
    """Return what the manifest says where nothing is excluded."""
    return {"files": [], "identity": config.identity, "method": "none"}


def _write_corpora(config: PreprocessConfig) -> None:
    """Do all in one command."""
    splitter = Splitter(config.split)  # first: what is wrong with it is quickly told
    plan = _plan(config)
    settings = _merge_settings(config, splitter, plan.description["exclusion"])
    with folder_written_whole(Path(config.output)) as partial:
        work = partial / "work"
        work.mkdir()
        write_parts(plan.units, plan.parts, work, config.workers)
        parts = [Part(work / unit.folder_name, settings.vocabulary, plan.parts.keep_identifiers) for unit in plan.units]
        _show_bad_records(parts)
        result = merge(parts, settings, partial, work)
        shutil.rmtree(work)
    print(_summary(result, splitter, config))


def _merge_settings(config: PreprocessConfig, splitter: Splitter, exclusion: dict[str, Any]) -> MergeSettings:
    vocabulary = get_vocabulary(config.vocabulary)
    old = open_old(Path(config.append), vocabulary, splitter, exclusion) if config.append else {}
    return MergeSettings(vocabulary, splitter, config.deduplicate, config.input, exclusion, old)


def _write_shard(config: PreprocessConfig) -> None:
    """Write the parts of every n-th unit into the shard's folder."""
    number, num_shards = shards.parse_shard(config.shard)
    if STANDARD_INPUT in config.input:
        raise InputError("shards cannot share standard input: name files, or leave out --shard.")
    Splitter(config.split)
    plan = _plan(config)
    output = Path(config.output)
    folder = shards.shard_folder(output, number, num_shards)
    if shards.is_finished(folder, plan.description):
        print(f"{folder}: is there already, made with the same settings")
        return
    units = plan.units[number::num_shards]
    with folder_written_whole(folder) as partial:
        write_parts(units, plan.parts, partial, config.workers)
        parts = [Part(partial / unit.folder_name, plan.parts.vocabulary, False) for unit in units]
        _show_bad_records(parts)
        shards.write_description(partial, plan.description)
    num_sequences = sum(part.report.num_sequences for part in parts)
    print(f"shard {config.shard}: {num_sequences:,} sequences of {len(units)} of {len(plan.units)} parts in {folder}")


def _merge_shards(config: PreprocessConfig) -> None:
    """Join the shards to corpora, which take the shards' place."""
    output = Path(config.output)
    if shards.take_place(output):
        print(f"{output}: is merged already")
        return
    found = shards.find_shards(output)
    description = shards.common_description(found)
    difference = shards.first_difference(
        {key: description.get(key) for key in config.content_settings()}, config.content_settings()
    )
    if difference:
        raise InputError(f"{output}: its shards were made with another '{difference}': merge with the same settings.")
    splitter = Splitter(config.split)
    settings = _merge_settings(config, splitter, description["exclusion"])
    has_identifiers = needs_identifiers(config.split)
    parts = [
        Part(folder, settings.vocabulary, has_identifiers)
        for folder in shards.part_folders(found, description["num_units"])
    ]
    with folder_written_whole(shards.merged_folder(output)) as partial:
        work = partial / "work"
        work.mkdir()
        result = merge(parts, settings, partial, work)
        shutil.rmtree(work)
    shards.take_place(output)
    print(_summary(result, splitter, config))


def _show_bad_records(parts: list[Part]) -> None:
    messages = [message for part in parts for message in part.report.bad_records]
    for message in messages[:NUM_SHOWN_BAD_RECORDS]:
        print(f"skipped: {message}", file=sys.stderr)


def _summary(result: MergeResult, splitter: Splitter, config: PreprocessConfig) -> str:
    lines = []
    for name, writer in result.writers.items():
        unit = "residues" if writer.vocabulary.is_per_residue else "tokens"
        mean = writer.num_residues / writer.num_sequences
        lines.append(
            f"{name}: {writer.num_sequences:,} sequences, {writer.num_residues:,} {unit}, mean length {mean:.1f}"
            + (f", {len(writer.families):,} families" if writer.families else "")
        )
    if result.changes:
        lines.append("changed: " + _listed(result.changes))
    if splitter.unlisted_families:
        lines.append(
            f"families not in the clans table, each taken as its own clan: {len(splitter.unlisted_families):,}"
        )
    counts = {
        "held out": (splitter.num_held_out, "sequences"),
        "not in the table of clusters, each taken as its own cluster": (splitter.num_without_cluster, "sequences"),
        "skipped": (result.num_skipped, "bad records"),
        "excluded": (result.num_excluded, f"sequences, listed in {config.output}/excluded.tsv"),
        "duplicates left out": (result.num_duplicates, "sequences"),
    }
    lines += [f"{what}: {count:,} {unit}" for what, (count, unit) in counts.items() if count]
    return "\n".join([*lines, f"written to {config.output}"])


def _listed(changes: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(changes.items()))
