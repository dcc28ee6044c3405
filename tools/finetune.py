"""Fine-tune a Hugging Face encoder on a task: TAPE's five, or labels in a table of your own."""

from __future__ import annotations

from pathlib import Path

from megaprot.common.quiet import quiet
from megaprot.common.watched import watched
from megaprot.finetune.config import FinetuneConfig

CONFIG = FinetuneConfig
RECIPES = Path(__file__).parent.parent / "finetune" / "recipes"


def run(config: FinetuneConfig) -> None:
    """Fine-tune as ``config`` says, on every process that ``torchrun`` started (one without it).

    Raises:
        InputError: Configuration, model or data are wrong (exit status 2).
        RunError: The run failed (exit status 1).
    """
    quiet("deepspeed")
    quiet("torch.distributed")
    from megaprot.finetune import runs
    from megaprot.finetune.processes import processes

    plan = runs.check(config)
    if config.check_processes:
        print(f"configuration, model and data are valid for {config.check_processes} processes")
        return
    with watched(config.output), processes(config.engine.timeout_minutes) as place:
        runs.take(plan, place)
