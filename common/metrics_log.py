"""Where a run's numbers go: ``metrics.jsonl`` always, the terminal, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megaprot.common.files import atomic_write


class LogTargets(Protocol):
    """Where a run's numbers go: its folder, and whether TensorBoard and a Weights & Biases project are told too."""

    dir: str
    tensorboard: bool
    wandb_project: str


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``; a last line cut short by a crash, or any without a step, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of the rows that hold ``key``; what was not finite is left out."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


class MetricsLog:
    """Writes rows of numbers by step; only the main process has one.

    A row's values are plain numbers; those that are not finite are written as null, so that any JSON reader can read
    the file. Rows of steps that a resumed run will take again are dropped first.

    Args:
        run: Run folder and loggers.
        first_step: Steps behind the run when it starts or resumes.
        num_steps: Steps of the whole run.
    """

    def __init__(self, run: LogTargets, first_step: int, num_steps: int) -> None:
        self.path = Path(run.dir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        with atomic_write(self.path) as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._kept = kept
        self.stream = self.path.open("a", encoding="utf-8", buffering=1)
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step") if sys.stdout.isatty() else None
        self.tensorboard: Any = None
        self.wandb: Any = None
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(Path(run.dir) / "tensorboard"), purge_step=first_step + 1)
        if run.wandb_project:
            import wandb

            # The folder makes the run's id, so that a requeued job goes on in the same run.
            folder = Path(run.dir).resolve()
            identifier = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
            self.wandb = wandb.init(
                project=run.wandb_project, id=identifier, name=folder.name, resume="allow", dir=run.dir
            )

    def has(self, step: int, key: str) -> bool:
        """True if the run had logged ``key`` at ``step`` before this start."""
        return any(row["step"] == step and key in row for row in self._kept)

    def write(self, row: dict[str, float]) -> None:
        """Write one row, which holds ``step``, everywhere but on the terminal."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.stream.write(json.dumps(finite) + "\n")
        step = int(row["step"])
        if self.tensorboard is not None:
            for key, value in row.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(finite, step=step)

    def say(self, line: str) -> None:
        """Print one line for the person at the terminal, above the progress bar if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step``."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Flush and close everything."""
        self.stream.close()
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
