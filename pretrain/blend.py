"""What a run is trained on: one corpus, or several and the share of the rows that each one gives."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import DataConfig
from megaprot.pretrain.corpus import Corpus


@dataclass(frozen=True)
class Blend:
    """Training and validation corpora of the same vocabulary, one of each a folder, and the weight of each folder."""

    train: tuple[Corpus, ...]
    valid: tuple[Corpus, ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of all corpora."""
        return self.train[0].vocabulary

    @property
    def num_sequences(self) -> int:
        """Training sequences of all corpora."""
        return sum(corpus.num_sequences for corpus in self.train)

    @property
    def num_residues(self) -> int:
        """Training residues of all corpora."""
        return sum(corpus.num_residues for corpus in self.train)

    @property
    def fingerprint(self) -> str:
        """The identity of the training data: a corpus's own checksum, or a checksum of theirs in order."""
        fingerprints = [corpus.fingerprint for corpus in self.train]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def folders_and_weights(data: DataConfig) -> dict[str, float]:
    """Return {corpus folder: weight} of ``data.path`` or ``data.blend``; raises InputError unless one is good."""
    if bool(data.path) == bool(data.blend):
        raise InputError(
            "give data.path, a folder that megaprot preprocess made, or data.blend, weights and folders, and not both."
        )
    if data.path:
        return {data.path: 1.0}
    weights, folders = data.blend[::2], data.blend[1::2]
    if len(weights) != len(folders):
        raise InputError("data.blend needs a folder after each weight, such as 0.7 pfam 0.3 uniref50.")
    blend: dict[str, float] = {}
    for text, folder in zip(weights, folders, strict=True):
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"data.blend has {text!r} where a weight above 0 belongs, before {folder}.")
        if folder in blend:
            raise InputError(f"data.blend names {folder} twice; give its whole weight once.")
        blend[folder] = weight
    return blend


def open_blend(data: DataConfig) -> Blend:
    """Return the corpora that ``data`` names, sizes (and checksums if small) checked.

    Raises:
        InputError: naming the folder or key that is wrong.
    """
    weights = folders_and_weights(data)
    pairs = [_open_folder(Path(folder), data) for folder in weights]
    first = pairs[0][0]
    for train, valid in pairs:
        for corpus in (train, valid):
            if corpus.vocabulary != first.vocabulary:
                raise InputError(
                    f"{corpus.prefix} has another vocabulary ({corpus.vocabulary.name}) than {first.prefix} "
                    f"({first.vocabulary.name}); preprocess them alike."
                )
    return Blend(tuple(train for train, _ in pairs), tuple(valid for _, valid in pairs), tuple(weights.values()))


def _open_folder(folder: Path, data: DataConfig) -> tuple[Corpus, Corpus]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; make it with megaprot preprocess.")
    if (folder / "train.json").is_file() and not (folder / "valid.json").is_file():
        raise InputError(
            f"{folder / 'valid.json'} is missing; run megaprot preprocess again, with --split.valid above 0."
        )
    train, valid = Corpus.open(folder / "train"), Corpus.open(folder / "valid")
    if data.sampling == "clusters" and not train.has_clusters:
        raise InputError(
            f"data.sampling clusters: {train.prefix} has no clusters; preprocess with --split.clusters TABLE, or "
            "sample sequences."
        )
    if data.verify:
        train.verify_if_small()
        valid.verify_if_small()
    return train, valid
