"""Near-identical sequences through the program MMseqs2 (Steinegger and Söding, Nature Biotechnology 2017).

MMseqs2 proposes, edlib measures: what identity means is the same as in ``megaprot.common.near_identity``. Of MMseqs2
only the prefilter is used, a heuristic that needs two similar k-mers on one diagonal and so misses some pairs, short
ones above all. Of 3,982 domains against 26,000 proteins it found, at 0.9, 863 of the 864 that the k-mer index finds and
no other, in nine times the index's time (6.3 against 0.7 s of one core). Its speed hardly depends on the identity:
below 0.75, where the index meets nearly every excluded sequence, it is the only one that is fast enough for a large
corpus; but of 149 at 0.7 it missed 21, at any sensitivity.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError, RunError
from megaprot.common.near_identity import Matches, Sequences, check_identity, nearest_excluded

PROGRAM = "mmseqs"
AUTO_BELOW_IDENTITY = 0.75
# As found by trial: low complexity is searched like the rest.
_SEARCH_OPTIONS = ["--mask", "0", "--comp-bias-corr", "0", "--max-seqs", "1000"]


def is_installed() -> bool:
    """Return whether the program is found on the PATH."""
    return shutil.which(PROGRAM) is not None


def chosen_method(method: str, identity: float) -> str:
    """Return ``kmer`` or ``mmseqs``: the method asked for, or for ``auto`` the better one of those there are."""
    if method == "auto":
        return "mmseqs" if identity < AUTO_BELOW_IDENTITY and is_installed() else "kmer"
    return method


class MmseqsSearch:
    """A search for near-identical sequences by MMseqs2, of the same interface as ``NearIdentityIndex``.

    ``letters`` uint8 [num_letters], ``bounds`` int64 [num_excluded + 1] and ``identity`` as there; ``letter_table``,
    256 bytes, gives the ASCII letter of each value of ``letters`` (``Vocabulary.letter_table``). Each call of
    ``matches`` starts the program anew, which takes seconds: give it many sequences at once. Files lie in a temporary
    folder that goes with this object.

    Raises:
        InputError: where the program is not installed; RunError where it fails.
    """

    def __init__(
        self, letters: NDArray[np.uint8], bounds: NDArray[np.int64], identity: float, letter_table: bytes
    ) -> None:
        if not is_installed():
            raise InputError(
                "exclude.method mmseqs needs the program mmseqs, which is not on the PATH: install MMseqs2 (package "
                "mmseqs2 of Debian and Ubuntu, of bioconda too), or choose exclude.method kmer."
            )
        self.excluded = Sequences(letters, bounds)
        self.identity = check_identity(identity)
        self.letter_table = letter_table
        self.method = f"mmseqs {_run('version').strip()}"
        self._folder = tempfile.TemporaryDirectory(prefix="megaprot-mmseqs-")
        self._make_database("excluded", self.excluded)

    def matches(self, letters: NDArray[np.uint8], bounds: NDArray[np.int64]) -> Matches:
        """Return which of the queries, laid out as the excluded sequences are, to leave out, and for what."""
        queries = Sequences(letters, bounds)
        if not len(letters):
            return nearest_excluded(queries, self.excluded, np.empty((0, 2), dtype=np.int64), self.identity)
        self._make_database("queries", queries)
        with tempfile.TemporaryDirectory(dir=self._folder.name) as scratch:
            table = f"{scratch}/hits.tsv"
            databases = [self._path("queries"), self._path("excluded"), f"{scratch}/hits"]
            # Its alignments are left out: edlib measures each hit anyway, and faster.
            _run("prefilter", *databases, "-s", self._sensitivity, *_SEARCH_OPTIONS)
            _run("createtsv", *databases, table)
            has_hits = Path(table).stat().st_size > 0  # else numpy warns
            pairs = np.loadtxt(table, dtype=np.int64, usecols=(0, 1), ndmin=2) if has_hits else _NO_PAIRS
        return nearest_excluded(queries, self.excluded, pairs, self.identity)

    @property
    def _sensitivity(self) -> str:
        """How unlike the k-mers may be that count as shared: sequences of high identity share equal ones."""
        return "2" if self.identity >= AUTO_BELOW_IDENTITY else "4"

    def _path(self, name: str) -> str:
        return f"{self._folder.name}/{name}"

    def _make_database(self, name: str, sequences: Sequences) -> None:
        """Write sequences, named by their numbers, as a database of the program."""
        with open(self._path(f"{name}.fasta"), "wb") as stream:
            for number in range(len(sequences)):
                text = sequences.text(number).translate(self.letter_table)
                if text:
                    stream.write(b">%d\n%b\n" % (number, text))
        _run("createdb", self._path(f"{name}.fasta"), self._path(name), "--shuffle", "0")


_NO_PAIRS = np.empty((0, 2), dtype=np.int64)


def _run(command: str, *arguments: str) -> str:
    """Run a command of the program and return what it printed; raises RunError where it fails."""
    options = [] if command == "version" else ["-v", "1"]
    done = subprocess.run([PROGRAM, command, *arguments, *options], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RunError(
            f"mmseqs {command} ended with status {done.returncode} ({' '.join(said)}): make room in the folder for "
            "temporary files, or choose exclude.method kmer."
        )
    return done.stdout
