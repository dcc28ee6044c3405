"""The most alike of many sequences to each of some others: by shared k-mers, or by an aligner where one is installed.

    find_hits(queries, targets, method) -> Hits        method kmer, mmseqs or diamond

MMseqs2 (Steinegger and Söding, Nature Biotechnology 2017) and DIAMOND (Buchfink et al., Nature Methods 2021) are run
as programs, with their own e-value limits; weights are then the bit scores of their alignments.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaprot.common.errors import InputError, RunError
from megaprot.finetune.function.kmer_similarity import Hits, KmerIndex

METHODS = ("kmer", "mmseqs", "diamond")
LEAST_ESTIMATE = 0.4
"""Estimated identity from which on k-mers mean more than chance: two proteins of 400 residues then share four."""


def find_hits(queries: Sequence[bytes], targets: Sequence[bytes], method: str) -> Hits:
    """Return each query's neighbours among the targets, all letters in ASCII.

    Raises:
        InputError: There is no such method, or its program is not on the PATH.
        RunError: The program fails.
    """
    if check_method(method) == "kmer":
        return KmerIndex(targets).hits(queries, LEAST_ESTIMATE)
    with tempfile.TemporaryDirectory(prefix="megaprot-neighbours-") as folder:
        return _aligned(Path(folder), queries, targets, method)


def check_method(method: str) -> str:
    """Return the method; raises InputError where there is none such, or its program is not on the PATH."""
    if method not in METHODS:
        raise InputError(f"there is no method '{method}' to find neighbours: choose {', '.join(METHODS)}.")
    if method != "kmer" and shutil.which(method) is None:
        raise InputError(f"the method {method} needs the program {method}, which is not on the PATH: install it, or "
                         "choose kmer.")  # fmt: skip
    return method


def _aligned(folder: Path, queries: Sequence[bytes], targets: Sequence[bytes], program: str) -> Hits:
    """Run an aligner in a folder and read its table of (query, target, bit score)."""
    for name, sequences in (("queries", queries), ("targets", targets)):
        with open(folder / f"{name}.fasta", "wb") as stream:
            stream.writelines(b">%d\n%b\n" % (number, letters) for number, letters in enumerate(sequences) if letters)
    table = folder / "hits.tsv"
    if program == "mmseqs":
        files = [str(folder / name) for name in ("queries.fasta", "targets.fasta", "hits.tsv", "scratch")]
        _run(["mmseqs", "easy-search", *files, "--format-output", "query,target,bits", "-v", "1"])
    else:
        database = str(folder / "targets")
        _run(["diamond", "makedb", "--quiet", "--in", f"{database}.fasta", "--db", database])
        named = ["--query", str(folder / "queries.fasta"), "--db", database, "--out", str(table)]
        _run(["diamond", "blastp", "--quiet", "--sensitive", *named, "--outfmt", "6", "qseqid", "sseqid", "bitscore"])
    rows = np.loadtxt(table, ndmin=2) if table.stat().st_size else np.empty((0, 3))  # else numpy warns
    numbers = rows[:, :2].astype(np.int64)
    return Hits.of(numbers[:, 0], numbers[:, 1], rows[:, 2].astype(np.float32), len(queries))


def _run(command: list[str]) -> None:
    """Run a program; raises RunError with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RunError(f"{' '.join(command[:2])} ended with status {done.returncode} ({' '.join(said)}): make room in "
                       "the folder for temporary files, or choose the method kmer.")  # fmt: skip
