"""Predict with a model of pairs: a file of pairs, or all pairs of one or two proteomes.

The output is made of parts, each scored by one process and written whole, in a folder beside it; a run that was killed
goes on with those that are missing. What is in memory is the proteins and one part.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from megaprot.common.files import atomic_write, sync_folder
from megaprot.common.part_folder import begin_parts, part_folder
from megaprot.finetune.model_folder import read_model
from megaprot.finetune.pairs.jobs import Job, PairRequest, open_job
from megaprot.finetune.pairs.scoring import PairScoring, open_scoring
from megaprot.finetune.processes import Place

HEADER = b"first\tsecond\tprobability\n"


def predict_pairs(request: PairRequest, place: Place) -> None:
    """Predict as asked and write the table; all ranks call it.

    Raises:
        InputError: The model is of another kind, or the input cannot be used.
        RunError: A score is not finite.
    """
    job_model = read_model(request.model, request.task, place.device, request.precision)
    job = open_job(request, job_model)
    folder = part_folder(request.output)
    if place.is_main:
        begin_parts(folder, job.settings)
    place.barrier()
    hidden = None if place.is_main else True
    with tqdm(desc="encode", unit="res", unit_scale=True, disable=hidden) as progress:
        scoring = open_scoring(job_model, job.proteins, folder, place, request.max_tokens, progress.update)
    with tqdm(total=job.num_pairs, desc="score", unit="pair", unit_scale=True, disable=hidden) as progress:
        num_parts = _write_parts(job, scoring, folder, place, progress.update)
    place.barrier()
    if place.is_main:
        num_lines = _join(folder, num_parts, request.output)
        print(f"{request.output}: {num_lines:,} of {job.num_pairs:,} pairs of {len(job.proteins):,} proteins")
    place.barrier()


def _write_parts(job: Job, scoring: PairScoring, folder: Path, place: Place, told: Callable[[int], object]) -> int:
    """Write the parts that fall to this process and are not there yet; return how many there are in all."""
    num_parts = 0
    for part in job.parts(scoring):
        path = _part_path(folder, num_parts)
        if num_parts % place.world_size == place.rank and not path.is_file():
            lines = job.lines(scoring, part)
            with atomic_write(path) as stream:
                stream.write(lines)
        told(job.size(part))
        num_parts += 1
    return num_parts


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:07d}.tsv"


def _join(folder: Path, num_parts: int, output: Path) -> int:
    """Make the output of all parts, remove them and return how many pairs it has."""
    num_lines, whole = 0, folder / "whole.tsv"
    with atomic_write(whole) as stream:
        stream.write(HEADER)
        for number in range(num_parts):
            part = _part_path(folder, number).read_bytes()
            num_lines += part.count(b"\n")
            stream.write(part)
    os.replace(whole, output)
    sync_folder(output.absolute().parent)
    shutil.rmtree(folder)
    return num_lines
