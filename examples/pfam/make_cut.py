"""Make this folder's cut of Pfam-A: ``python make_cut.py Pfam-A.fasta.gz Pfam-A.clans.tsv FOLDER``.

Whole families with at least MIN_MEMBERS domains, in the order of a hash of their accession, at most MAX_MEMBERS of each
(those with the lowest hashes of their names), until there are NUM_DOMAINS. The same input gives the same bytes.
"""

import gzip
import hashlib
import sys
from collections import defaultdict
from pathlib import Path

from megaprot.common.sequence_readers import Record, read_fasta

MIN_MEMBERS = 250
MAX_MEMBERS = 400
NUM_DOMAINS = 12_000
LINE_RESIDUES = 60


def rank(text: str) -> bytes:
    """Return a hash to sort by: an order that has nothing to do with what is sorted."""
    return hashlib.sha256(text.encode()).digest()


def choose(records: list[Record]) -> list[Record]:
    """Return the records of the cut, family by family."""
    members: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.family:
            members[record.family].append(record)
    chosen: list[Record] = []
    for family in sorted((name for name in members if len(members[name]) >= MIN_MEMBERS), key=rank):
        if len(chosen) >= NUM_DOMAINS:
            break
        chosen += sorted(members[family], key=lambda record: rank(record.identifier))[:MAX_MEMBERS]
    return chosen


def main(fasta: str, clans: str, folder: str) -> None:
    """Write ``Pfam-A.cut.fasta.gz`` and ``Pfam-A.clans.cut.tsv`` into ``folder``."""
    chosen = choose(list(read_fasta(fasta)))
    lines = []
    for record in chosen:
        sequence = record.sequence.decode()
        lines.append(f">{record.identifier} {record.description}\n")
        lines += [f"{sequence[start : start + LINE_RESIDUES]}\n" for start in range(0, len(sequence), LINE_RESIDUES)]
    # mtime 0: the time of writing must not be part of the bytes
    Path(folder, "Pfam-A.cut.fasta.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    families = {record.family for record in chosen}
    table = [line for line in Path(clans).read_text().splitlines(keepends=True) if line.split("\t")[0] in families]
    Path(folder, "Pfam-A.clans.cut.tsv").write_text("".join(table))
    print(f"{len(chosen)} domains of {len(families)} families")


if __name__ == "__main__":
    main(*sys.argv[1:])
