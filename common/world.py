"""Join the processes that a launcher started, over NCCL or gloo, and tell when one of them is gone."""

import datetime
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megaprot.common.errors import LostPeersError, RunError

_MEETING_SECONDS = 300.0  # from the first rank that has started to rank 0


def join_world(timeout_minutes: float) -> torch.device:
    """Join the world that ``torchrun`` describes (a world of one without it) and return this process's device.

    Args:
        timeout_minutes: Longest wait in one collective.

    Raises:
        RunError: Rank 0 cannot be reached.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if has_cuda else "gloo"
    if os.environ["WORLD_SIZE"] == "1":
        # Alone, a rendezvous in memory: two runs on one machine never meet on a port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        _meet_rank_0()
        dist.init_process_group(backend, timeout=timeout)
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")


def _meet_rank_0() -> None:
    """Wait until rank 0's address answers; raises RunError where it never does.

    torch waits as long as for any collective, and what it then says is a traceback.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # this process opens the port; or torchrun has
    end = time.monotonic() + _MEETING_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > end:
            raise RunError(
                f"rank 0 could not be reached at {address} port {port} for {_MEETING_SECONDS:.0f} s ({problem}); look "
                "at that machine, its firewall, and whether the name is that of a network all nodes share."
            )
        time.sleep(0.5)


@contextmanager
def named_losses() -> Iterator[None]:
    """Raise LostPeersError in place of what a collective raises when another process is gone or does not answer."""
    try:
        yield
    except BaseException as error:
        if lost_peers(error):
            line = str(error).strip().splitlines()[0][:200]
            raise LostPeersError(
                f"another process of the run is gone or does not answer ({line}); look for the first message of "
                "another rank, and start again."
            ) from error
        raise


def lost_peers(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or does not answer: gloo says so in words alone."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
