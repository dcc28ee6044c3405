"""The table of clusters, MMseqs2's ``cluster<TAB>member``: identifiers as 64-bit hashes, 16 bytes a member."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers.source import Source
from megaprot.tools.preprocessing.kernels import identifier_hashes

_BLOCK_BYTES = 1 << 24
_TAB, _LINE_END = 9, 10


@dataclass(frozen=True)
class ClusterTable:
    """Hashes of the members' identifiers, ascending, and of their clusters' names, both uint64 [num_members]."""

    members: NDArray[np.uint64]
    clusters: NDArray[np.uint64]

    def clusters_of(self, identifiers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return a key for each sequence's cluster, [n]: the hash of its name, of a sequence in none its own hash."""
        places = np.minimum(np.searchsorted(self.members, identifiers), len(self.members) - 1)
        return np.where(self.members[places] == identifiers, self.clusters[places], identifiers)

    def num_without(self, identifiers: NDArray[np.uint64]) -> int:
        """Return how many of the sequences are in no cluster."""
        places = np.minimum(np.searchsorted(self.members, identifiers), len(self.members) - 1)
        return int(np.count_nonzero(self.members[places] != identifiers))


def read_clusters(path: Path) -> ClusterTable:
    """Read a table of clusters, plain or compressed; its first two columns count.

    Raises:
        InputError: for a line of fewer columns, or a member of two clusters.
    """
    pairs, num_lines = [], 0
    rest = b""
    with Source(path).content() as stream:
        while block := stream.read(_BLOCK_BYTES):
            lines, line_end, rest = (rest + block).rpartition(b"\n")
            pairs.append(_read_lines(lines + line_end, path, num_lines))
            num_lines += len(pairs[-1])
    if rest:
        pairs.append(_read_lines(rest + b"\n", path, num_lines))
    if not pairs:
        raise InputError(f"{path}: is empty: give MMseqs2's table of clusters.")
    clusters, members = np.concatenate([pair[:, 0] for pair in pairs]), np.concatenate([pair[:, 1] for pair in pairs])
    del pairs
    order = np.argsort(members, kind="stable")
    members, clusters = members[order], clusters[order]
    is_same = members[1:] == members[:-1]
    if (is_same & (clusters[1:] != clusters[:-1])).any():
        line = int(order[1:][is_same & (clusters[1:] != clusters[:-1])].min()) + 1
        raise InputError(f"{path}:{line}: names a member that another cluster has too: let each be in one cluster.")
    return ClusterTable(members, clusters)


def _read_lines(content: bytes, path: Path, num_lines_before: int) -> NDArray[np.uint64]:
    """Return hashes of the first two columns of whole lines, uint64 [num_lines, 2]."""
    text = np.frombuffer(content, dtype=np.uint8)
    ends = np.flatnonzero(text == _LINE_END)
    starts = np.concatenate(([0], ends[:-1] + 1))
    tabs = np.concatenate((np.flatnonzero(text == _TAB), [len(text), len(text)]))
    first = np.searchsorted(tabs, starts)
    tab, next_tab = tabs[first], tabs[np.minimum(first + 1, len(tabs) - 1)]
    stops = np.minimum(next_tab, ends)
    is_bad = (tab >= ends) | (tab == starts) | (stops - tab < 2)
    if is_bad.any():
        line = num_lines_before + int(np.flatnonzero(is_bad)[0]) + 1
        raise InputError(f"{path}:{line}: is not 'cluster<TAB>member': give MMseqs2's table of clusters.")
    return np.stack(
        [identifier_hashes(text, np.stack(bounds, axis=1)) for bounds in ((starts, tab), (tab + 1, stops))], axis=1
    )
