"""Names, ports, and an all-reduce between real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from megaprot.tools.diagnosis.finding import Finding

WORKER = (sys.executable, "-m", "megaprot.tools.diagnosis.all_reduce")
"""The program of one process of the all-reduce; it is told its place by RANK, WORLD_SIZE and LOCAL_RANK."""


def check_host_name() -> Finding:
    """Resolve this machine's own name, which rendezvous and gloo need."""
    name = socket.gethostname()
    try:
        return Finding("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        remedy = f"add {name} to /etc/hosts or to the name server."
        return Finding("host name", "failed", f"{name} does not resolve", remedy)


def check_port(port: int) -> Finding:
    """Bind the rendezvous port, as the first process of a run will."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", port))
            taken.listen()
        except OSError as error:
            remedy = f"end what listens there (ss -ltnp 'sport = :{port}'), or give another --port."
            return Finding("port", "failed", f"port {port} cannot be used ({error.strerror})", remedy)
    return Finding("port", "ok", f"port {port} is free")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def start_worker(
    worker: Sequence[str], rank: int, world: int, host: str, port: int, local: int
) -> subprocess.Popen[str]:
    """Start one process of an all-reduce; ``local`` is the number of the GPU it uses, if there is one."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    place["LOCAL_RANK"] = str(local)
    return subprocess.Popen(
        [*worker],
        env=os.environ | place | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _ending(status: int) -> str:
    """Return how a process ended, in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def await_workers(processes: Sequence[subprocess.Popen[str]], timeout_seconds: float) -> tuple[str, dict[str, Any]]:
    """Wait for processes of an all-reduce; none is left behind.

    Returns:
        What went wrong with which process (empty: nothing), and what the first one measured: ``gb_per_second`` and
        ``clocks``, the seconds each process's clock showed at one moment.
    """
    deadline = time.monotonic() + timeout_seconds
    statuses: list[int | None] = [None] * len(processes)
    while None in statuses and time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if any(statuses):  # one has failed: the others only wait for it
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
    outputs = [process.communicate()[0] for process in processes]
    failed = [f"process {rank} {_ending(status)}" for rank, status in enumerate(statuses) if status]
    late = [f"process {rank}" for rank, status in enumerate(statuses) if status is None]
    if failed:
        return "; ".join(failed), {}
    if late:
        return f"{' and '.join(late)} had not finished after {timeout_seconds:.0f} s", {}
    return "", json.loads(outputs[0])


def check_all_reduce(timeout_seconds: float, worker: Sequence[str] = WORKER) -> Finding:
    """Let two processes of this machine add up a tensor, by NCCL where there are two GPUs, else by gloo.

    Args:
        timeout_seconds: Longest wait.
        worker: Program of one process.
    """
    port = free_port()
    processes = [start_worker(worker, rank, 2, "127.0.0.1", port, rank) for rank in range(2)]
    problem, measured = await_workers(processes, timeout_seconds)
    if problem:
        remedy = "see that no firewall closes local ports; NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME=lo tell more."
        return Finding("all-reduce", "failed", problem, remedy)
    return Finding("all-reduce", "ok", "two processes", "", measured["gb_per_second"], "GB/s")
