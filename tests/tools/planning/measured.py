"""Worker: the memory one training step really holds, by part, under one layout after another.

``python -m tests.tools.planning.measured RESULTS CASES CORPUS``: CASES is a JSON list of configurations; each gives a
line of RESULTS with the bytes of the fullest rank. Weights, gradients and optimizer state are counted by storage; kept
activations and the peak by the storages that operators make and that are still alive.
"""

import gc
import json
import logging
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaprot.pretrain import parallel
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.step import accumulate_gradients, apply_gradients
from megaprot.pretrain.training import Training
from megaprot.pretrain.validation import validate
from tests.distributed.layouts import Layouts, to_config
from tests.distributed.run import run_processes


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """{address: bytes} of the storages behind some tensors, each once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, from when they appear until Python and autograd let go."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.most = self.most_kept = 0
        self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        """Count a storage unless it is known; forget it when it is freed."""
        if storage._cdata in self.known or not storage.nbytes():
            return
        self.known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, identity: int, num_bytes: int) -> None:
        """Take a freed storage off the count."""
        self.known.discard(identity)
        self.bytes -= num_bytes

    @contextmanager
    def noting_backward(self) -> Iterator[None]:
        """Note the bytes alive whenever a backward pass starts, those of recomputation left out."""
        original = torch.autograd.backward

        def noting(*args: Any, **options: Any) -> None:
            self.most_kept = max(self.most_kept, self.bytes) if self.depth == 0 else self.most_kept
            self.depth += 1
            original(*args, **options)
            self.depth -= 1

        torch.autograd.backward = noting
        try:
            yield
        finally:
            torch.autograd.backward = original


def optimizer_tensors(optimizer: Any) -> Iterable[Tensor]:
    """Moments and master weights."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def measure(config: PretrainConfig, layouts: Layouts) -> dict[str, float]:
    """Build the run, take a step to warm up and one to measure; the bytes of this rank by part."""
    blend = validate(config, dist.get_world_size())
    place = layouts.lay_out(config.parallel)
    training = Training(config, blend, place)
    parameters = [parameter for chunk in training.chunks for parameter in chunk.module.parameters()]
    weights = storages(parameters)
    buffers = [buffer for chunk in training.chunks for buffer in chunk.buffers]
    gradients = storages(buffer.grad_data for buffer in buffers)
    held = list(optimizer_tensors(training.optimizer))
    state = {address: size for address, size in storages(held).items() if address not in weights}
    lasting = [*parameters, *held, *(buffer.grad_data for buffer in buffers)]
    rows = [rows for _, rows, _ in training.steps()]

    def step(mine: Any) -> None:
        result = accumulate_gradients(training.chunks, training.optimizer, mine, place)
        apply_gradients(training.optimizer, result.grad_norm, 1.0)

    step(rows[0])
    gc.collect()
    alive = Alive()
    with alive.noting_backward(), alive:
        alive.known |= {t.untyped_storage()._cdata for t in lasting}
        step(rows[1])
    found = {"weights": sum(weights.values()), "gradients": sum(gradients.values()), "optimizer": sum(state.values())}
    found |= {"activations": alive.most_kept, "step_peak": alive.most, "pipeline_rank": place.pipeline_rank}
    found["parameters"] = sum(parameter.numel() for parameter in parameters)
    return found


def measure_layouts(cases: list[PretrainConfig], num_processes: int, corpus: Path) -> list[list[dict[str, float]]]:
    """Start ``num_processes`` processes that measure every case; by case, what each rank holds."""
    listed = corpus / f"cases{num_processes}.json"
    listed.write_text(json.dumps([asdict(config) for config in cases]))
    lines = run_processes("tests.tools.planning.measured", num_processes, [str(listed), str(corpus)])
    return [line["ranks"] for line in lines]


def main() -> None:
    """Measure every case of the list."""
    results, listed, corpus = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    layouts = Layouts(parallel.start_processes(5.0))
    for values in json.loads(listed.read_text()):
        values["data"]["path"], values["run"]["dir"] = str(corpus), str(corpus / "no such run")
        mine = measure(to_config(values), layouts)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            with results.open("a") as stream:
                stream.write(json.dumps({"ranks": everyone}) + "\n")
        gc.collect()
    parallel.stop_processes()


if __name__ == "__main__":
    main()
