"""On each rank: short runs on pairs with every ZeRO stage asked for; rank 0 writes losses and scores a stage.

Arguments: RESULTS MODEL DATA OUTPUT STAGES.
"""

import json
import sys
from pathlib import Path

from megaprot.common.metrics_log import read_metrics
from megaprot.common.stopping import StopRequest
from megaprot.finetune.config import EngineConfig, FinetuneConfig, HeadConfig, OptimConfig, TrainConfig
from megaprot.finetune.config_ppi import PpiConfig
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.processes import processes
from megaprot.finetune.splits import prepare
from megaprot.finetune.training import Run, train


def main() -> None:
    """Run all stages in one world."""
    results, model, data, output, stages = sys.argv[1:]
    with processes(5.0) as place:
        for stage in map(int, stages.split(",")):
            config = FinetuneConfig(
                task="ppi",
                model=model,
                data=data,
                output=f"{output}/{place.world_size}-{stage}",
                head=HeadConfig(hidden_size=16, dropout=0.0),
                optim=OptimConfig(lr=1e-3, warmup_share=0.3),
                train=TrainConfig(num_steps=4, batch_size=5, max_tokens=120, log_interval=1),
                engine=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
                ppi=PpiConfig(max_length=50),
            )
            task, train_split, valid_split = prepare(config, load_encoder(Path(config.model)))
            run = Run(config, task, train_split, valid_split, place)
            train(run, StopRequest())
            evaluated = run.validate()
            if place.is_main:
                rows = read_metrics(Path(config.output) / "metrics.jsonl")
                scores = [outcome["logits"].tolist() for outcome in evaluated.outcomes]
                losses = [row["loss"] for row in rows if "loss" in row]
                with open(results, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"stage": stage, "losses": losses, "scores": scores}) + "\n")
            place.barrier()


if __name__ == "__main__":
    main()
