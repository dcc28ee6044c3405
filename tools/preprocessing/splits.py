"""Which split each sequence falls into.

It is a pure function of the seed and a key (the sequence itself, its family, clan or cluster), so that neither the
order of the input nor what else is in it matters, and a key never lies in two splits. What is held out goes to the test
split.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import key, keys
from megaprot.common.errors import InputError
from megaprot.common.files import sha256_of
from megaprot.common.sequence_readers.source import Source
from megaprot.tools.preprocessing.clusters import ClusterTable, read_clusters
from megaprot.tools.preprocessing.config import SplitConfig
from megaprot.tools.preprocessing.kernels import identifier_hashes

SPLITS = ("train", "valid", "test")
TEST = SPLITS.index("test")
# Rao et al., "Evaluating Protein Transfer Learning with TAPE", NeurIPS 2019
TAPE_HOLD_OUT = [
    *("CL0635", "CL0624", "CL0355", "CL0100", "CL0417", "CL0630"),
    *("PF18346", "PF14604", "PF18697", "PF03577", "PF01112", "PF03417"),
]
_DRAW = 11  # what the keys of counter_random are drawn for
_FAMILY_KEY, _CLAN_KEY = np.uint64(1 << 40), np.uint64(2 << 40)
_ACCESSION = re.compile(r"(PF\d{5,9}|CL\d{4,})(\.\d+)?")


class Splitter:
    """Names the split of each sequence, from the settings alone.

    ``unlisted_families`` are those met that the table of clans lacks, ``num_held_out`` and ``num_without_cluster``
    count sequences.

    Raises:
        InputError: for fractions that leave no training split, for tables that are missing, unneeded or malformed, and
            for something to be held out that cannot be.
    """

    def __init__(self, config: SplitConfig) -> None:
        check_split_settings(config)
        self.config = config
        self.unlisted_families: set[int] = set()
        self.num_held_out = 0
        self.num_without_cluster = 0
        families, clans, identifiers = _read_hold_out(config.hold_out)
        if bool(config.clans) != (config.by == "clan" or bool(clans)):
            raise InputError(
                "split.clans Pfam-A.clans.tsv and what needs it, split.by clan or clans in split.hold_out, need each "
                "other: give both or neither."
            )
        if config.by == "cluster" and (families or clans):
            raise InputError(
                "split.by cluster takes only files of sequence identifiers as split.hold_out, since families and clans "
                "cut through clusters."
            )
        self.clan_of_family = read_clans(Path(config.clans)) if config.clans else {}
        self._listed = np.array(sorted(self.clan_of_family), dtype=np.int32)
        self._clans = np.array([self.clan_of_family[family] for family in self._listed.tolist()], dtype=np.int64)
        self._held_families = self._families_held_out(families, clans)
        self._held_identifiers = _hashes(identifiers)
        self.clusters = read_clusters(Path(config.clusters)) if config.clusters else None
        self._held_clusters = np.unique(self._table.clusters_of(self._held_identifiers)) if config.clusters else _NONE

    def _families_held_out(self, families: set[int], clans: set[int]) -> NDArray[np.int32]:
        missing = clans - set(self.clan_of_family.values())
        if missing:
            named = ", ".join(f"CL{clan:04d}" for clan in sorted(missing))
            raise InputError(
                f"{self.config.clans}: has no family of {named}, which split.hold_out names: correct either."
            )
        members = {family for family, clan in self.clan_of_family.items() if clan in clans}
        return np.array(sorted(families | members), dtype=np.int32)

    @property
    def _table(self) -> ClusterTable:
        assert self.clusters is not None
        return self.clusters

    @property
    def names(self) -> list[str]:
        """Return the splits that were asked for."""
        return [SPLITS[number] for number in self.numbers]

    @property
    def numbers(self) -> list[int]:
        """Return the places in SPLITS of the splits that were asked for."""
        test = self.config.test > 0 or bool(self.config.hold_out)
        return [number for number, is_asked in enumerate((True, self.config.valid > 0, test)) if is_asked]

    def assign(
        self, hashes: NDArray[np.uint64], families: NDArray[np.int32], identifiers: NDArray[np.uint64]
    ) -> NDArray[np.uint8]:
        """Return the split of each sequence [n], a place in SPLITS.

        ``hashes`` are of the contents, ``families`` Pfam numbers or -1, ``identifiers`` hashes of identifiers, needed
        where ``needs_identifiers`` says so.
        """
        bits = keys(key(_DRAW, self.config.seed), self._keys(hashes, families, identifiers))
        drawn = bits.astype(np.float64) / 2.0**64
        valid, test = self.config.valid, self.config.test
        splits = np.where(drawn < valid, 1, np.where(drawn < valid + test, TEST, 0)).astype(np.uint8)
        is_held_out = np.isin(families, self._held_families)
        if len(self._held_identifiers):
            is_held_out |= np.isin(identifiers, self._held_identifiers)
            if self.config.by == "cluster":
                is_held_out |= np.isin(self._table.clusters_of(identifiers), self._held_clusters)
        splits[is_held_out] = TEST
        self.num_held_out += int(np.count_nonzero(is_held_out))
        return splits

    def cluster_keys(self, identifiers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return a number for each sequence [n] that those of its cluster share; needs a table of clusters."""
        self.num_without_cluster += self._table.num_without(identifiers)
        return self._table.clusters_of(identifiers)

    def _keys(
        self, hashes: NDArray[np.uint64], families: NDArray[np.int32], identifiers: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        if self.config.by == "random":
            return hashes
        if self.config.by == "cluster":
            return self._table.clusters_of(identifiers)
        family_keys = families.astype(np.uint64) | _FAMILY_KEY
        if self.config.by == "family" or not len(self._listed):
            return family_keys
        places = np.minimum(np.searchsorted(self._listed, families), len(self._listed) - 1)
        is_listed = self._listed[places] == families
        self.unlisted_families.update(np.unique(families[~is_listed]).tolist())
        clans = np.where(is_listed, self._clans[places], 0)
        return np.where(clans > 0, clans.astype(np.uint64) | _CLAN_KEY, family_keys)

    def settings(self) -> dict[str, Any]:
        """Return the settings for the manifest, with the checksums of all files that they name."""
        named = {"clans": self.config.clans, "clusters": self.config.clusters}
        checksums = {f"{name}_sha256": sha256_of(Path(path)) for name, path in named.items() if path}
        held = [sha256_of(Path(entry)) for entry in self.config.hold_out if not _is_accession(entry)]
        return asdict(self.config) | checksums | ({"hold_out_sha256": held} if held else {})


_NONE = np.empty(0, dtype=np.uint64)


def check_split_settings(config: SplitConfig) -> None:
    """Raise InputError for fractions that leave nothing, and for a cluster split without its table."""
    if not (config.valid >= 0 and config.test >= 0 and config.valid + config.test < 1):
        raise InputError(
            f"split.valid {config.valid} and split.test {config.test} leave nothing to train on: "
            "give fractions from 0 that add up to less than 1."
        )
    if config.by == "cluster" and not config.clusters:
        raise InputError("split.by cluster needs a table of clusters: give it as split.clusters.")


def needs_identifiers(config: SplitConfig) -> bool:
    """Return whether splitting needs the identifiers of the sequences: for clusters, or identifiers held out."""
    return bool(config.clusters) or any(not _is_accession(entry) for entry in config.hold_out)


def read_clans(path: Path) -> dict[int, int]:
    """Return {Pfam family number: clan number, or 0 for none} from Pfam's table of clans (tab-separated)."""
    clans = {}
    for number, line in enumerate(_read_lines(path, "Pfam's table Pfam-A.clans.tsv"), start=1):
        found = re.match(r"PF(\d{5,9})\t(?:CL(\d{4,9}))?(?:\t|$)", line)
        if not found:
            raise InputError(f"{path}:{number}: is not 'family<TAB>clan<TAB>...': give Pfam's table Pfam-A.clans.tsv.")
        clans[int(found[1])] = int(found[2] or 0)
    return clans


def _read_hold_out(entries: list[str]) -> tuple[set[int], set[int], list[str]]:
    """Return the families, clans and sequence identifiers that entries of ``split.hold_out`` stand for."""
    accessions: list[str] = []
    identifiers: list[str] = []
    for entry in entries:
        if entry == "tape":
            accessions += TAPE_HOLD_OUT
        elif _is_accession(entry):
            accessions.append(entry)
        elif not Path(entry).is_file():
            raise InputError(
                f"split.hold_out names '{entry}', which is no Pfam family (PF00067), no clan (CL0001), not tape and no "
                "file: correct it."
            )
        else:
            lines = [line.strip() for line in _read_lines(Path(entry), "accessions or identifiers, one a line")]
            accessions += [line for line in lines if _ACCESSION.fullmatch(line)]
            identifiers += [line for line in lines if line and not _ACCESSION.fullmatch(line)]
    families, clans = (
        {int(text[2:].split(".")[0]) for text in accessions if text.startswith(kind)} for kind in ("PF", "CL")
    )
    return families, clans, identifiers


def _is_accession(entry: str) -> bool:
    return entry == "tape" or bool(_ACCESSION.fullmatch(entry))


def _read_lines(path: Path, wanted: str) -> list[str]:
    try:
        with Source(path).content() as stream:
            return stream.read().decode().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: holds binary data: give {wanted}.") from None


def _hashes(identifiers: Iterable[str]) -> NDArray[np.uint64]:
    """Return the hashes of identifiers, ascending, each once."""
    texts = [identifier.encode() for identifier in identifiers]
    ends = np.cumsum([0, *map(len, texts)])
    bounds = np.stack((ends[:-1], ends[1:]), axis=1)
    return np.unique(identifier_hashes(np.frombuffer(b"".join(texts), dtype=np.uint8), bounds))
