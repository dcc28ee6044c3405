"""The same losses, metrics and models on one, two and three processes and with every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.run import run_processes
from tests.finetune.folders import esm_folder
from tests.finetune.tasks_data import secondary_structure

WORKER = "tests.finetune.training_worker"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    esm_folder(folder / "model", token_dropout=False)
    secondary_structure(folder / "data", {"train": 24, "valid": 10})
    return folder


def run(inputs: Path, num_processes: int, stages: str, precision: str = "fp32") -> dict[int, dict[str, Any]]:
    output = inputs / f"runs-{precision}"
    arguments = [str(inputs / "model"), str(inputs / "data"), str(output), stages, precision]
    return {one["stage"]: one for one in run_processes(WORKER, num_processes, arguments, 300.0)}


def last_model(inputs: Path, num_processes: int, stage: int) -> dict[str, torch.Tensor]:
    folder = inputs / "runs-fp32" / f"{num_processes}-{stage}" / "last"
    return load_file(folder / "encoder" / "model.safetensors") | load_file(folder / "head.safetensors")


@pytest.mark.slow
def test_processes_and_zero_stages_agree(inputs: Path) -> None:
    """Each run is resumed half way, and the splits have uneven shards: 10 proteins on 3 processes."""
    alone = run(inputs, 1, "0")[0]
    assert len(alone["losses"]) == 4
    assert alone["losses"][3] < alone["losses"][0]
    weights = last_model(inputs, 1, 0)
    for num_processes, stages in ((2, "0,1,2,3"), (3, "2,3")):
        for stage, found in run(inputs, num_processes, stages).items():
            assert found["losses"] == pytest.approx(alone["losses"], abs=1e-4), (num_processes, stage)
            for ours, expected in zip(found["valid"], alone["valid"], strict=True):
                assert ours == pytest.approx(expected, abs=1e-4)
            for name, weight in last_model(inputs, num_processes, stage).items():
                assert torch.allclose(weight, weights[name], atol=1e-4), (num_processes, stage, name)


@pytest.mark.slow
def test_bf16_trains_beside_fp32(inputs: Path) -> None:
    found = run(inputs, 2, "1,2", "bf16")
    for one in found.values():
        assert len(one["losses"]) == 4
        assert one["losses"][3] < one["losses"][0]
