"""The packing plans of a corpus, epoch by epoch; those of large corpora are made once a machine and kept on its disk.

Every process of a machine maps the same file, so that a plan of 34 million sequences (3 seconds, 150 MB) is neither
made nor held by each of them.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray

from megaprot.common.counter_random import key, scalar_bits
from megaprot.common.errors import InputError
from megaprot.common.files import folder_written_whole
from megaprot.common.packing_plan import PackingPlan, plan_epoch
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.rows import RowShape

_MEMBER = 5  # what a key is drawn for, see ``megaprot.pretrain.rows``
_PLAN_VERSION = 1  # raised whenever the same arguments give another plan
_NUM_PLANS_KEPT = 2  # loaders read ahead, so that a step can need the plan of this epoch and of the next one
_NUM_FILED_PLANS = 8  # on a machine; several runs may share it
FILED_FROM = 1 << 20  # sequences; a smaller plan is made in a tenth of a second


@dataclass
class EpochPlans:
    """The packing of each epoch of one corpus: every sequence once or, by ``clusters``, one member of every cluster.

    Args:
        corpus: What is packed.
        shape: What rows are like.
        seed: With the epoch it decides orders and members.
        by_clusters: Draw clusters, then a member of each.
        folder: Where plans are filed; empty: a folder of this user among the machine's temporary files.
    """

    corpus: Corpus
    shape: RowShape
    seed: int
    by_clusters: bool = False
    folder: str = ""
    _plans: dict[int, PackingPlan] = field(default_factory=dict, repr=False)

    def plan(self, epoch: int) -> PackingPlan:
        """Return the packing of an epoch; the two asked for last are kept."""
        plan = self._plans.pop(epoch, None) or self._made_or_filed(epoch)
        self._plans[epoch] = plan
        if len(self._plans) > _NUM_PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        return plan

    def _made_or_filed(self, epoch: int) -> PackingPlan:
        if self.corpus.num_sequences < FILED_FROM:
            return self._made(epoch)
        folder = Path(self.folder) if self.folder else user_folder()
        return filed_plan(folder, self._name(epoch), lambda: self._made(epoch))

    def _made(self, epoch: int) -> PackingPlan:
        shape, boundary = self.shape, self.corpus.vocabulary.num_boundary_tokens
        lengths = self.corpus.lengths
        if not self.by_clusters:
            return plan_epoch(lengths, shape.row_tokens, shape.max_sequence_length, boundary, self.seed, epoch)
        starts, members = self.corpus.clusters
        drawn = _draw_members(starts, members, key(_MEMBER, self.seed, epoch))
        plan = plan_epoch(lengths[drawn], shape.row_tokens, shape.max_sequence_length, boundary, self.seed, epoch)
        return PackingPlan(plan.row_starts, drawn[plan.sequence_ids])

    def _name(self, epoch: int) -> str:
        """Return a name that holds all that the plan depends on."""
        files = self.corpus.manifest["files"]
        facts = [
            _PLAN_VERSION,
            files[".idx"]["sha256"],
            files[".clusters"]["sha256"] if self.by_clusters else "",
            self.shape.row_tokens,
            self.shape.max_sequence_length,
            self.corpus.vocabulary.num_boundary_tokens,
            self.seed,
            epoch,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@numba.njit(cache=True, nogil=True)
def _draw_members(starts: NDArray[np.int64], members: NDArray[np.int64], key: np.uint64) -> NDArray[np.int64]:
    """Return one member of each cluster, int64 [num_clusters]; cluster c is ``members[starts[c] : starts[c + 1]]``."""
    drawn = np.empty(len(starts) - 1, dtype=np.int64)
    for cluster in range(len(drawn)):
        size = np.uint64(starts[cluster + 1] - starts[cluster])
        place = (scalar_bits(key, cluster) >> np.uint64(32)) * size >> np.uint64(32)
        drawn[cluster] = members[starts[cluster] + np.int64(place)]
    return drawn


def user_folder() -> Path:
    """Return this user's folder for plans among the machine's temporary files, which nobody else can write to.

    Raises:
        InputError: where something that is not this user's stands in its place.
    """
    folder = Path(tempfile.gettempdir()) / f"megaprot-plans-{os.getuid()}"
    with suppress(OSError):  # who files a plan in it tells why it cannot be made
        folder.mkdir(mode=0o700)
    state = folder.lstat() if os.path.lexists(folder) else None
    if state and (state.st_uid != os.getuid() or state.st_mode & 0o022 or not stat.S_ISDIR(state.st_mode)):
        raise InputError(f"{folder}: is not this user's own folder: remove it or give data.plan_folder.")
    return folder


def filed_plan(folder: Path, name: str, make: Callable[[], PackingPlan]) -> PackingPlan:
    """Return the plan filed as ``folder/name``, memory-mapped; where there is none, one process makes and files it.

    The others wait for it. Where it cannot be written, the plan is made in memory by each process, and said so.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            plan = _opened(folder / name)
            if plan is None:
                _file(folder / name, make())
                plan = _opened(folder / name)
            if plan is None:
                raise OSError(0, "what was written cannot be read")
            _drop_oldest(folder)
            return plan
    except (OSError, InputError) as error:
        print(f"the packing plan cannot be filed in {folder} ({error}): each process makes its own", file=sys.stderr)
        return make()


def _file(path: Path, plan: PackingPlan) -> None:
    shutil.rmtree(path, ignore_errors=True)  # a damaged one
    with folder_written_whole(path) as partial:
        np.save(partial / "row_starts.npy", plan.row_starts)
        np.save(partial / "sequence_ids.npy", plan.sequence_ids)


def _opened(path: Path) -> PackingPlan | None:
    """Return the plan in a folder, or None where there is none that is whole."""
    try:
        row_starts, sequence_ids = (
            np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("row_starts", "sequence_ids")
        )
    except (OSError, ValueError, EOFError):
        return None
    if not len(row_starts) or row_starts[-1] != len(sequence_ids):
        return None
    os.utime(path)
    return PackingPlan(np.asarray(row_starts), np.asarray(sequence_ids))


def _drop_oldest(folder: Path) -> None:
    """Remove the plans used longest ago; who has one mapped keeps it."""
    plans = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in plans[:-_NUM_FILED_PLANS]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of the machine; it ends with the process at the latest. The file is removed by who holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)
