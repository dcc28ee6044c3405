"""Which cores each rank of a node may use: equal shares, whole cores, in the order of the sockets."""

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def core_order(cpu: int, topology: Path = TOPOLOGY) -> tuple[int, int, int]:
    """Return (socket, core, cpu): sorted, the threads of a core and the cores of a socket stand together."""
    folder = topology / f"cpu{cpu}" / "topology"
    try:
        package, core = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return (0, cpu, cpu)
    return (package, core, cpu)


def shares(cpus: set[int], num_ranks: int, topology: Path = TOPOLOGY) -> list[set[int]]:
    """Return one share of ``cpus`` a rank; all of them to each where there are fewer than ranks."""
    ordered = sorted(cpus, key=lambda cpu: core_order(cpu, topology))
    size = len(ordered) // num_ranks
    if not size:
        return [set(cpus)] * num_ranks
    return [set(ordered[rank * size : (rank + 1) * size]) for rank in range(num_ranks)]


def available_cpus() -> set[int]:
    """Return the cores this process may use; macOS only tells how many there are."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
