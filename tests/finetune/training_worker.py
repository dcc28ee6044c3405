"""On each rank: short runs with every ZeRO stage asked for; rank 0 writes losses and metrics a stage.

Arguments: RESULTS MODEL DATA OUTPUT STAGES [PRECISION]; each run is taken in two halves, the second from its save.
"""

import json
import sys
from pathlib import Path

import torch

from megaprot.common.metrics_log import read_metrics
from megaprot.common.stopping import StopRequest
from megaprot.finetune.config import EngineConfig, FinetuneConfig, HeadConfig, OptimConfig, TrainConfig
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.processes import Place, processes
from megaprot.finetune.splits import prepare
from megaprot.finetune.training import Run, train


def run_stage(config: FinetuneConfig, place: Place) -> dict[str, object]:
    """Take a run in two halves and return what its log says."""
    task, train_split, valid_split = prepare(config, load_encoder(Path(config.model)))
    for num_steps in (2, 4):
        run = Run(config, task, train_split, valid_split, place)
        run.num_steps = 4  # the schedule of the whole
        stop = StopRequest()
        stop.is_made = False
        take_step = run.take_step

        def stopping(
            take_step: object = take_step, stop: StopRequest = stop, run: Run = run, last: int = num_steps
        ) -> tuple[float, int, float]:
            stop.is_made = run.progress.step + 1 == last and place.rank == place.world_size - 1  # one rank is told
            return take_step()  # type: ignore[operator, no-any-return]

        run.take_step = stopping  # type: ignore[method-assign]
        train(run, stop)
    rows = read_metrics(Path(config.output) / "metrics.jsonl") if place.is_main else []
    return {
        "stage": config.engine.zero_stage,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "valid": [[row["valid_loss"], row["valid_accuracy"], row["valid_f1_macro"]] for row in rows
                  if "valid_loss" in row],
    }  # fmt: skip


def main() -> None:
    """Run all stages in one world."""
    results, model, data, output, stages, *precision = sys.argv[1:]
    torch.manual_seed(0)
    with processes(5.0) as place:
        for stage in map(int, stages.split(",")):
            config = FinetuneConfig(
                task="secondary_structure",
                model=model,
                data=data,
                output=f"{output}/{place.world_size}-{stage}",
                head=HeadConfig(name="mlp", hidden_size=16, dropout=0.0),
                optim=OptimConfig(lr=1e-3, warmup_share=0.3),
                train=TrainConfig(
                    num_steps=4, batch_size=5, max_tokens=60, log_interval=1, eval_interval=2,
                    precision=precision[0] if precision else "fp32",  # type: ignore[arg-type]
                ),
                engine=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
            )  # fmt: skip
            found = run_stage(config, place)
            if place.is_main:
                with open(results, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(found) + "\n")
            place.barrier()


if __name__ == "__main__":
    main()
