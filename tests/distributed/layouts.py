"""Worker: train the same steps under one layout after another inside one start of the processes.

``python -m tests.distributed.layouts RESULTS CASES CORPUS WEIGHTS``: CASES is a JSON list of [name, configuration];
each gives one line of RESULTS and, in the folder WEIGHTS, the final weights of the whole model.
"""

import gc
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaprot.pretrain import parallel
from megaprot.pretrain.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
)
from megaprot.pretrain.training import Training
from megaprot.pretrain.validation import validate
from tests.distributed.run import run_processes
from tests.pretrain.global_weights import gather_global


def to_config(values: dict[str, Any]) -> PretrainConfig:
    """The configuration that ``dataclasses.asdict`` made ``values`` of."""
    return PretrainConfig(
        model=ModelConfig(**values["model"]),
        parallel=ParallelConfig(**values["parallel"]),
        data=DataConfig(**values["data"]),
        optim=OptimConfig(**values["optim"]),
        train=TrainConfig(**values["train"]),
        run=RunConfig(**values["run"]),
    )


class Layouts:
    """Lays groups out anew where the sizes differ from the last: every gloo group keeps threads busy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sizes: tuple[int, ...] = ()

    def lay_out(self, config: ParallelConfig) -> parallel.Place:
        """This process's place under ``config``."""
        sizes = (config.tensor, config.pipeline, config.virtual_pipeline)
        if sizes != self.sizes:
            self._forget_groups()
            self.place = parallel.lay_out(config, self.device)
            self.sizes = sizes
        return self.place

    def _forget_groups(self) -> None:
        """Take down all groups but the world, which megatron-core alone would keep alive without a name."""
        parallel_state.destroy_model_parallel()
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        gc.collect()


def train_case(name: str, config: PretrainConfig, layouts: Layouts, weights: Path) -> dict[str, Any]:
    """Run one configuration to its end on the present world; returns what every step said."""
    blend = validate(config, dist.get_world_size())
    place = layouts.lay_out(config.parallel)
    training = Training(config, blend, place)
    results = [training.take_step(step, rows, [1.0])[0] for step, rows, _ in training.steps()]
    whole, unequal_replicas = gather_global(chunk.module for chunk in training.chunks)
    tally = training.validate()
    if place.is_main:
        torch.save(whole, weights / f"{name}.pt")
    return {
        "name": name,
        "unequal_replicas": unequal_replicas,
        "losses": [result.tally.mean_loss for result in results],
        "counts": [result.tally.count for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "requests": [result.requests[0] for result in results],
        "validation": asdict(tally),
    }


def run_layouts(
    cases: dict[str, PretrainConfig], num_processes: int, corpus: Path, weights: Path, use_cuda: bool = False
) -> dict[str, dict[str, Any]]:
    """Start ``num_processes`` processes that train every case; returns their results by name."""
    weights.mkdir(parents=True, exist_ok=True)
    listed = weights / f"cases{num_processes}.json"
    listed.write_text(json.dumps([(name, asdict(config)) for name, config in cases.items()]))
    arguments = [str(listed), str(corpus), str(weights)]
    found = run_processes("tests.distributed.layouts", num_processes, arguments, use_cuda=use_cuda)
    assert [line["name"] for line in found] == list(cases)
    return {line["name"]: line for line in found}


def main() -> None:
    """Train every case of the list."""
    results, listed, corpus, weights = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    layouts = Layouts(parallel.start_processes(5.0))
    for name, values in json.loads(listed.read_text()):
        started = time.perf_counter()
        values["data"]["path"] = str(corpus)
        values["run"]["dir"] = str(weights / "no such run")
        line = train_case(name, to_config(values), layouts, weights)
        if dist.get_rank() == 0:
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)  # seen when the run fails
            with results.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
    parallel.stop_processes()


if __name__ == "__main__":
    main()
