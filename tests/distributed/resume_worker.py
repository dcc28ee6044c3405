"""Worker: run one job after another inside one start of the processes.

``python -m tests.distributed.resume_worker RESULTS JOBS``: JOBS is a JSON list of :class:`Job`. A run leaves its
numbers and checkpoints in its own folder; an evaluation and a poisoned run also write a line of RESULTS.
"""

import json
import logging
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaprot.pretrain import parallel
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.evaluation import evaluate_checkpoint
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.training import Training, train
from megaprot.pretrain.validation import validate
from tests.distributed.layouts import Layouts, to_config
from tests.distributed.run import run_processes
from tests.pretrain.runs import replace_take_step


@dataclass
class Job:
    """One job under one layout.

    Attributes:
        name: What its line of the results is called.
        config: The run.
        start: Checkpoint that is put into the run's folder first; empty for none.
        evaluate: Checkpoint to evaluate, instead of a run; empty for a run.
        poisoned_rank: Rank whose first weight is NaN during the second step; -1 for none.
    """

    name: str
    config: PretrainConfig
    start: str = ""
    evaluate: str = ""
    poisoned_rank: int = -1


def run_jobs(jobs: list[Job], num_processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Start ``num_processes`` processes that do every job; returns the lines of the results by name."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([asdict(job) for job in jobs]))
    lines = run_processes("tests.distributed.resume_worker", num_processes, [str(listed)], timeout_seconds=600)
    return {line["name"]: line for line in lines}


def poison(training: Training, rank: int) -> list[dict[str, Any]]:
    """Make one weight of ``rank`` NaN during step 1; the list is filled with what each step did on this rank."""
    take_step, said = training.take_step, []
    weights = [weight for chunk in training.chunks for weight in chunk.parameters()]

    def take_step_poisoned(step: int, *arguments: Any) -> Any:
        before = [weight.detach().clone() for weight in weights]
        if step == 1 and dist.get_rank() == rank:
            weights[0].data.view(-1)[0] = math.nan
        result, reason = take_step(step, *arguments)
        if step == 1 and dist.get_rank() == rank:
            weights[0].data.view(-1)[0] = before[0].view(-1)[0]
        said.append({"skipped": bool(reason), "changed": not all(map(torch.equal, before, weights))})
        return result, reason

    replace_take_step(training, take_step_poisoned)
    return said


def do(job: Job, place: Place) -> dict[str, Any] | None:
    """Do one job in the present layout; returns its line of the results, if it has one."""
    config = job.config
    if job.evaluate:
        corpus = Corpus.open(Path(config.data.path) / "valid")
        return evaluate_checkpoint(Path(job.evaluate), config, corpus, 0, place)
    if job.start and place.is_main:
        shutil.copytree(job.start, Path(config.run.dir) / "checkpoints" / Path(job.start).name)
    dist.barrier()
    training = Training(config, validate(config, place.world_size), place)
    said = poison(training, job.poisoned_rank) if job.poisoned_rank >= 0 else []
    train(training)
    if not said:
        return None
    everyone: list[Any] = [None] * place.world_size
    dist.all_gather_object(everyone, said)
    return {"steps": everyone}


def main() -> None:
    """Do every job of the list."""
    results, listed = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    layouts = Layouts(parallel.start_processes(5.0))
    for values in json.loads(listed.read_text()):
        job = Job(**values | {"config": to_config(values["config"])})
        place = layouts.lay_out(job.config.parallel)
        line = do(job, place)
        if line is not None and place.is_main:
            with results.open("a") as stream:
                stream.write(json.dumps({"name": job.name} | line) + "\n")
    parallel.stop_processes()


if __name__ == "__main__":
    main()
