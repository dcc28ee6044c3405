"""Real processes for tests: start a module under torchrun, wait, and read what it has to say."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_LAST_LINES = 60


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants: torchrun's workers lead sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def run_processes(
    module: str, num_processes: int, arguments: Sequence[str], timeout_seconds: float = 600.0, use_cuda: bool = False
) -> list[dict[str, Any]]:
    """Run ``python -m module RESULTS arguments...`` on ``num_processes`` ranks of one torchrun.

    The module writes JSON lines to the file RESULTS on one rank. CUDA devices are hidden unless ``use_cuda``, so that
    several ranks never share one.

    Returns:
        The parsed lines. A run that fails or takes longer than ``timeout_seconds`` fails the test with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if not use_cuda:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(Path(folder) / "log", "w+b") as log:
            process = subprocess.Popen(
                [*launcher, "-m", module, str(results), *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                status = process.wait(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                status = f"no end after {timeout_seconds:.0f} s"
            finally:
                _kill_tree(process)
            log.seek(0)
            words = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        assert status == 0, f"{module} on {num_processes} processes: {status}\n" + "\n".join(words)
        return [json.loads(line) for line in results.read_text().splitlines()]
