"""The processes (ranks) of one node: started, watched, told of signals, and ended together with one message.

torchrun's work, done otherwise: it turns every exit status into 1, restarts what ended on purpose, dies of SIGUSR1 and
gives ranks that wait for a dead one as long as those that save. Ranks here die with their launcher, whatever ends it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megaprot.launch.binding import available_cpus, shares
from megaprot.launch.rank_logs import RankLog, redirection
from megaprot.launch.vital_signs import FOLDER_VARIABLE, VitalSigns

LOST_PEERS = 3
"""Exit status of a rank that ended because another was gone: a victim, not the cause."""
WRONG_INPUT = 2
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

_STACKS_SECONDS = 2.0
_DEATH_SECONDS = 30.0
_POLL_SECONDS = 0.1
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_NODE = os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Node:
    """What one node starts.

    Attributes:
        command: Words that start one rank.
        num_local: Ranks of this node.
        index: Number of this node.
        num_nodes: Nodes of the run; all have as many ranks.
        address: Host of rank 0.
        port: Port on which the ranks meet there.
        log_folder: Where each rank's output goes as well, a file a rank; empty: only to the terminal.
        bind_cores: Give each rank its own share of the cores.
        grace_seconds: Time the ranks have to save and end after a signal.
        silent_seconds: Longest time a rank may show no sign of life.
        hang_seconds: Longest time a rank may not get on.
        last_words_seconds: Time the others have to end after one has failed: on a GPU they would wait for it for ever.
    """

    command: list[str]
    num_local: int
    index: int = 0
    num_nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    log_folder: str = ""
    bind_cores: bool = False
    grace_seconds: float = 300.0
    silent_seconds: float = 60.0
    hang_seconds: float = 600.0
    last_words_seconds: float = 10.0

    @property
    def ranks(self) -> list[int]:
        """Numbers of this node's ranks in the world."""
        return list(range(self.index * self.num_local, (self.index + 1) * self.num_local))


@dataclass
class Ending:
    """How the ranks of a node ended.

    Attributes:
        status: Exit status for the launcher: 0, that of the rank that failed first, or 128 + its signal.
        message: What happened, empty where all went well or a signal ended the ranks.
        is_on_purpose: A rank found its input wrong or gave up with a message of its own: it would end the same again.
        is_by_signal: The launcher was told to end the ranks.
    """

    status: int = 0
    message: str = ""
    is_on_purpose: bool = False
    is_by_signal: bool = False

    @property
    def is_fault(self) -> bool:
        """Whether something broke, and starting again may help."""
        return self.status != 0 and not self.is_on_purpose and not self.is_by_signal


@dataclass
class Signals:
    """The signals received while ranks run, in order. Handlers only remember; the watching loop acts."""

    numbers: list[int] = field(default_factory=list)

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._remember) for number in FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.numbers.append(number)


class Ranks:
    """The ranks of one node in one start: a context manager at whose end none is left.

    Args:
        node: What to start.
        environment: Variables of the launcher and those added for the ranks.
    """

    def __init__(self, node: Node, environment: dict[str, str]) -> None:
        self.node, self.environment = node, environment
        self.folder = Path(tempfile.mkdtemp(prefix="megaprot-launch-"))
        self.signs = VitalSigns(self.folder, node.ranks, node.silent_seconds, node.hang_seconds)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.logs: list[RankLog] = []
        self.failed: dict[int, int] = {}  # rank: return code, in the order in which they were seen
        self.ended_by_us: set[int] = set()

    def __enter__(self) -> "Ranks":
        if self.node.log_folder:
            Path(self.node.log_folder).mkdir(parents=True, exist_ok=True)
        cores = shares(available_cpus(), self.node.num_local)
        for local_rank, rank in enumerate(self.node.ranks):
            self._start(rank, local_rank, cores[local_rank])
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for log in self.logs:
            log.close(1.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, rank: int, local_rank: int, cores: set[int]) -> None:
        node = self.node
        variables = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": node.num_local * node.num_nodes,
            "LOCAL_WORLD_SIZE": node.num_local,
            "MASTER_ADDR": node.address,
            "MASTER_PORT": node.port,
            FOLDER_VARIABLE: self.folder,
        }
        process = subprocess.Popen(
            node.command,
            env=self.environment | {name: str(value) for name, value in variables.items()},
            start_new_session=True,  # Ctrl-C reaches the launcher alone, and all of a rank's processes can be ended
            preexec_fn=_tied_to_parent(),
            **redirection(bool(node.log_folder)),
        )
        self.processes[rank] = process
        if node.bind_cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)
        if node.log_folder:
            file = Path(node.log_folder) / f"rank_{rank:05d}.log"
            self.logs.append(RankLog(process, file, rank, (sys.stdout.buffer, sys.stderr.buffer)))

    def running(self) -> set[int]:
        """Return the ranks that still run; notes those that have failed since the last call."""
        running = set()
        for rank, process in self.processes.items():
            code = process.poll()
            if code is None:
                running.add(rank)
            elif code != 0 and rank not in self.failed:
                self.failed[rank] = code
        return running

    def send(self, number: int) -> None:
        """Send a signal to every rank that runs: to the rank alone, not to processes of its own."""
        for rank in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait until no rank runs, at most ``seconds``; returns whether none does."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def kill(self) -> None:
        """End every rank and what it has started, at once; one that waits for a dead disk cannot be, and is left."""
        self.ended_by_us |= self.running()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_DEATH_SECONDS)

    def write_stacks(self) -> str:
        """Let the ranks write the stacks of their threads; returns where they are, in words."""
        if self.signs.signs:
            self.send(signal.SIGUSR2)
        self.send(signal.SIGCONT)
        time.sleep(_STACKS_SECONDS)
        target = Path(self.node.log_folder or tempfile.mkdtemp(prefix="megaprot-stacks-"))
        found = [file for file in self.folder.glob("stacks_*.txt") if file.stat().st_size]
        for file in found:
            shutil.copy(file, target / file.name)
        return f"; the stacks of its threads and the others' are in {target}" if found else ""


def _tied_to_parent() -> "Callable[[], object] | None":
    """Return what a new process calls to be ended when this one dies, however it dies; None where only Linux can."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def run_ranks(node: Node, environment: dict[str, str], signals: Signals) -> Ending:
    """Start the ranks of this node, watch them to the end, and say how it was."""
    with Ranks(node, environment) as ranks:
        num_passed_on, deadline, looked_at = 0, 0.0, 0.0
        while running := ranks.running():
            for number in signals.numbers[num_passed_on:]:
                ranks.send(number)
                deadline = deadline or time.monotonic() + node.grace_seconds
            num_passed_on = len(signals.numbers)
            insists = signals.numbers.count(signal.SIGINT) > 1
            if deadline and (insists or time.monotonic() > deadline):
                ranks.kill()
                first = signal.Signals(signals.numbers[0])
                late = f"ranks that had not ended {node.grace_seconds:g} s after {first.name} were killed"
                return Ending(128 + first, late, is_by_signal=True)
            if time.monotonic() - looked_at > min(1.0, node.silent_seconds / 4):
                looked_at = time.monotonic()
                ranks.signs.read()
                fault = ranks.signs.fault(running)
                if fault:
                    return _end_after_hang(ranks, *fault)
            if ranks.failed and not signals.numbers:
                break
            time.sleep(_POLL_SECONDS)
        ranks.wait(node.last_words_seconds)
        ranks.signs.read()
        ranks.kill()
        return _ending(ranks, signals)


def _end_after_hang(ranks: Ranks, rank: int, what: str) -> Ending:
    """End the ranks of a node of which one is stopped or hangs."""
    where = ranks.write_stacks()
    ranks.kill()
    step = ranks.signs.last_step(rank)
    return Ending(1, f"rank {rank} on {_NODE} {what}{step}{where}")


def _ending(ranks: Ranks, signals: Signals) -> Ending:
    """Say how the ranks of a node ended, all of which have."""
    failed = {rank: code for rank, code in ranks.failed.items() if rank not in ranks.ended_by_us}
    if not failed:
        return Ending()
    # Not the cause: who lost another rank, and who was ended by the signal while it left.
    causes = [rank for rank, code in failed.items() if code != LOST_PEERS and -code not in signals.numbers]
    if not causes and signals.numbers:
        return Ending(128 + signals.numbers[0], is_by_signal=True)
    rank = causes[0] if causes else next(iter(failed))
    code, step = failed[rank], ranks.signs.last_step(rank)
    if not causes:
        lost = f"the ranks on {_NODE} have lost those of other nodes{step}; see what other nodes say, if they still can"
        return Ending(LOST_PEERS, lost)
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}{step}"
        how += " (often for using too much memory)" if -code == signal.SIGKILL else ""
    else:
        how = f"ended with exit status {code}{step}; its message is above"
    is_on_purpose = code == WRONG_INPUT or ranks.signs.gave_up(rank)
    status = code if code > 0 else 128 - code
    return Ending(status, f"rank {rank} on {_NODE} {how}", is_on_purpose, bool(signals.numbers))
