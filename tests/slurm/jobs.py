"""Jobs on the test cluster: submitted by the launcher, followed through their log and their run folder."""

import copy
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megaprot.common.metrics_log import read_metrics
from tests.distributed.launched import QUIET


def slurm(*words: str) -> str:
    """Run one of Slurm's commands and return what it says."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def launch_slurm(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``megaprot launch slurm`` with these words."""
    program = [sys.executable, "-m", "megaprot.tools.cli", "launch", "slurm", *words]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, env=os.environ | QUIET)


class Job:
    """A job submitted with these words, the first one of a chain; ``folder`` is its run folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        done = launch_slurm(*words)
        assert done.returncode == 0, done.stderr
        self.number, *self.later = re.findall(r"submitted job (\d+)", done.stdout)
        self.folder = folder

    def next_of_chain(self) -> "Job":
        """The job that starts when this one has ended."""
        job = copy.copy(self)
        job.number, *job.later = self.later
        return job

    @property
    def log(self) -> str:
        """What the job has said so far."""
        file = self.folder / "logs" / f"job-{self.number}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def state(self) -> str:
        """Slurm's word for its state."""
        match = re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", self.number))
        return match[1] if match else ""

    def minutes(self) -> int:
        """Whole minutes that it has been running since its last start."""
        match = re.search(r"RunTime=(\d+):(\d+):", slurm("scontrol", "show", "job", self.number))
        return int(match[1]) * 60 + int(match[2]) if match else 0

    def step(self) -> int:
        """The last step in the run's log."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def wait_for(self, happened: Callable[[], Any], what: str, seconds: float = 200.0) -> None:
        """Wait until something has happened; fail with the job's log where it takes too long."""
        end = time.monotonic() + seconds
        while not happened():
            if self.state == "PENDING":  # Slurm lets two minutes pass before it starts a requeued job
                update = ["scontrol", "update", f"JobId={self.number}", "StartTime=now"]
                subprocess.run(update, capture_output=True, timeout=60)
            assert time.monotonic() < end, f"no {what} after {seconds} s ({self.state}):\n{self.log[-6000:]}"
            time.sleep(0.2)

    def wait_for_start(self, number: int, num_steps: int = 4) -> None:
        """Wait until the ``number``-th start of the ranks has taken some steps."""
        self.wait_for(lambda: self.log.count("\nlayout ") >= number, f"start {number}")
        first = self.step()
        self.wait_for(lambda: self.step() >= first + num_steps, f"steps of start {number}")

    def processes(self) -> list[psutil.Process]:
        """Every process whose command names the run folder or the program and this job's."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in " ".join(process.cmdline()) and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                continue
        return found
