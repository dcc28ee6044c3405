"""A fine-tuning run of two ranks that loses one: who it was is said, and the run ends as if nothing had happened."""

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaprot.finetune.config import FinetuneConfig, TrainConfig
from tests.distributed.launched import Launched
from tests.finetune.folders import esm_folder
from tests.finetune.tasks_data import secondary_structure


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, launched: list[Launched]
) -> None:
    model = esm_folder(tmp_path / "model")
    data = secondary_structure(tmp_path / "data", {"train": 24, "valid": 6})
    train = TrainConfig(num_steps=150, batch_size=8, log_interval=1, save_interval=5, eval_interval=150)
    config = FinetuneConfig(
        task="secondary_structure", model=str(model), data=str(data), output=str(tmp_path / "run"), train=train
    )
    run = Launched(config, 2, "--max_restarts", "1")
    launched.append(run)
    run.wait_for(lambda: run.step() >= 12, "twelve steps")
    run.ranks()[1].send_signal(signal.SIGKILL)
    assert run.finish() == 0, run.output
    assert re.search(r"launch: rank 1 on \S+ was killed by SIGKILL, after step \d+ .*\(1 of at most 1\)\n", run.output)
    assert re.search(r"going on from step \d*[05]\n", run.output)
    assert "Traceback" not in run.output
    assert not run.left_over()

    whole = Launched(replace(config, output=str(tmp_path / "whole")), 2)
    launched.append(whole)
    assert whole.finish() == 0, whole.output
    for part in ("head.safetensors", "encoder/model.safetensors"):
        found, expected = (load_file(tmp_path / name / "last" / part) for name in ("run", "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
