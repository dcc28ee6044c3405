"""A real run under ``megaprot launch local`` that a test may signal, stop or kill, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.metrics_log import read_metrics
from megaprot.finetune.config import FinetuneConfig
from megaprot.pretrain.config import PretrainConfig

QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


class Launched:
    """``megaprot launch local ... -- pretrain`` or ``finetune`` of a configuration in ``num_processes`` ranks, started.

    Args:
        config: The run; its recipe and the launcher's output are written beside its run folder.
        num_processes: Ranks.
        options: More words for the launcher.
        environment: More variables.
    """

    def __init__(
        self, config: PretrainConfig | FinetuneConfig, num_processes: int, *options: str, **environment: str
    ) -> None:
        command, folder = (
            ("finetune", config.output) if isinstance(config, FinetuneConfig) else ("pretrain", config.run.dir)
        )
        self.folder = Path(folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        recipe = self.folder.with_suffix(".yaml")
        recipe.write_text(config_to_yaml(config))
        self.output_file = self.folder.with_suffix(".log")
        words = ["launch", "local", "--nproc", str(num_processes), *options, "--", command]
        words += ["--config", str(recipe)]
        with open(self.output_file, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megaprot.tools.cli", *words],
                env=os.environ | QUIET | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """What launcher and ranks have said so far."""
        return self.output_file.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """All processes below the launcher; those ever seen are remembered."""
        found = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.seen |= {process.pid: process for process in found}
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that are ranks, by number."""
        ranks = {}
        for process in self.family():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if process.ppid() == self.process.pid and "LOCAL_RANK" in environment:
                ranks[int(environment["RANK"])] = process
        return ranks

    def step(self) -> int:
        """The last step in the run's log."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def wait_for(self, happened: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
        """Wait until something has happened; fail with the run's output where it ends before or takes too long."""
        end = time.monotonic() + seconds
        while not happened():
            self.family()
            assert self.process.poll() is None, f"ended before {what}:\n{self.output[-5000:]}"
            assert time.monotonic() < end, f"no {what} after {seconds} s:\n{self.output[-5000:]}"
            time.sleep(0.05)

    def finish(self, seconds: float = 240.0) -> int:
        """Wait for the launcher's end and return its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self.output[-5000:]}") from None

    def left_over(self, seconds: float = 5.0) -> list[psutil.Process]:
        """Processes of the run that are still there ``seconds`` after its end."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def end(self) -> None:
        """End whatever is left, after a test that failed."""
        self.family()
        for process in [*self.seen.values(), self.process]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        self.process.wait()
