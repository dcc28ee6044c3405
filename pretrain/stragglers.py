"""Which rank holds the others up: each times a small fixed piece of work of its own, and its wait for rows.

In synchronous training every rank's step takes as long as the slowest one's, so steps tell nothing; what a rank does
without the others does (after NVIDIA's resiliency extension and ``gpu_sniff_test``).
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megaprot.pretrain.parallel import Place

_SIZES = {"cpu": 256, "cuda": 4096}  # of the square matrices: about a millisecond
_SLOWER = 2.0  # times the median: clocks of healthy devices of one kind are within a fifth
_LONG_WAIT = 0.25  # share of an interval that rows may keep a rank waiting
_IN_A_ROW = 2  # intervals: once may be chance


def probe_seconds(device: torch.device) -> float:
    """Return the least of three timings of a small matrix product on ``device``."""
    size = _SIZES[device.type]
    matrix = torch.ones(size, size, device=device)
    timings = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a number waits for the device
        timings.append(time.perf_counter() - started)
    return min(timings[1:])


def slow_ranks(
    probes: Sequence[float], waits: Sequence[float], interval_seconds: float, is_cpu: bool = False
) -> dict[int, str]:
    """Return {rank: why it is slow} from what each rank measured.

    Args:
        probes: Seconds of the fixed work, by rank.
        waits: Seconds each rank waited for rows in the interval.
        interval_seconds: Length of the interval.
        is_cpu: Ranks share cores, whose timings jump: twice as much is demanded.
    """
    median = statistics.median(probes)
    limit = _SLOWER * (2.0 if is_cpu else 1.0)
    slow = {
        rank: f"computes {probe / median:.1f} times slower than the median"
        for rank, probe in enumerate(probes)
        if probe > limit * median
    }
    for rank, wait in enumerate(waits):
        if wait > _LONG_WAIT * interval_seconds and wait > 2 * statistics.median(waits):
            slow.setdefault(rank, f"waited {wait:.1f} of {interval_seconds:.1f} s for its rows")
    return slow


class Stragglers:
    """Watches for slow ranks, interval by interval; every rank has one and calls :meth:`look` alike."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.seconds_waited = 0.0
        self.times_slow: dict[int, int] = {}
        hosts: list[str] = [""] * place.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        self.hosts = hosts

    def look(self, interval_seconds: float, is_saving: bool = False) -> list[str]:
        """Compare all ranks over the interval that ends; return a line for each one that was slow twice in a row.

        While a save is written in the background nobody is judged: the thread takes cores and the disk from the ranks
        that write, however healthy they are. The next look is then the next in a row.

        Args:
            interval_seconds: Length of the interval.
            is_saving: Whether a save is being written, as all ranks know alike.
        """
        waited, self.seconds_waited = self.seconds_waited, 0.0
        if self.place.world_size == 1 or is_saving:
            return []
        mine = torch.tensor([probe_seconds(self.place.device), waited], device=self.place.device)
        everyone = [torch.empty_like(mine) for _ in range(self.place.world_size)]
        dist.all_gather(everyone, mine)
        probes, waits = (list(values) for values in torch.stack(everyone).T.tolist())
        slow = slow_ranks(probes, waits, interval_seconds, self.place.device.type == "cpu")
        self.times_slow = {rank: self.times_slow.get(rank, 0) + 1 for rank in slow}
        return [
            f"straggler: rank {rank} on {self.hosts[rank]} {why}"
            for rank, why in slow.items()
            if self.times_slow[rank] == _IN_A_ROW
        ]
