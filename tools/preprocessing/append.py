"""The corpora that new ones begin with."""

from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.corpus import Corpus
from megaprot.tools.preprocessing.shards import first_difference
from megaprot.tools.preprocessing.splits import Splitter

_NAMED_BY_CHECKSUM = ("name", "clans")


def open_old(folder: Path, vocabulary: Vocabulary, splitter: Splitter, exclusion: dict[str, Any]) -> dict[str, Corpus]:
    """Return the corpora in ``folder`` by split, checked whole.

    Raises:
        InputError: where they are damaged, were made with another vocabulary, division or exclusion, or have clusters.
    """
    if splitter.clusters is not None:
        raise InputError(
            "append and split.clusters exclude each other: preprocess all input in one run to have clusters."
        )
    if not (folder / "train.json").exists():
        raise InputError(f"{folder}: holds no corpora: name a folder that `megaprot preprocess` wrote as append.")
    found = sorted(path.stem for path in folder.glob("*.json"))
    if found != sorted(splitter.names):
        raise InputError(
            f"{folder}: holds the splits {', '.join(found)}, but the settings ask for "
            f"{', '.join(sorted(splitter.names))}: give the split settings it was made with."
        )
    corpora = {name: Corpus.open(folder / name) for name in splitter.names}
    for name, corpus in corpora.items():
        corpus.verify()
        if corpus.vocabulary != vocabulary:
            raise InputError(
                f"{folder / name}: has the vocabulary {corpus.vocabulary.name}, not the {vocabulary.name} given: "
                "give the one it has."
            )
        _check_settings(folder / name, corpus.manifest, splitter, exclusion)
    return corpora


def _check_settings(prefix: Path, manifest: dict[str, Any], splitter: Splitter, exclusion: dict[str, Any]) -> None:
    old, new = (
        {key: value for key, value in settings.items() if key not in _NAMED_BY_CHECKSUM}
        for settings in (manifest["split"], splitter.settings())
    )
    difference = first_difference(old, new)
    if difference:
        raise InputError(
            f"{prefix}: was made with another split.{difference}: give the split settings it was made with."
        )
    old, new = (
        {"identity": value["identity"], "files": sorted(file["sha256"] for file in value["files"])}
        for value in (manifest["exclusion"], exclusion)
    )
    difference = first_difference(old, new)
    if difference:
        raise InputError(
            f"{prefix}: was made with another exclude.{difference}: exclude the same sequences as it does."
        )
