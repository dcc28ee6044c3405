"""A run goes on under any layout: bit for bit under its own, on the same data and to rounding under another.

All layouts share one start of four processes. One-process runs beside them, in the test process, are the reference.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.metrics_log import read_metrics
from megaprot.pretrain import parallel
from megaprot.pretrain.checkpoint import read_state, saved_steps
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.parallel import Place
from tests.distributed.resume_worker import Job, run_jobs
from tests.pretrain.runs import Rows, begin, copy_checkpoint, rows_of, run, saved_tensors, small_config, write_corpus
from tests.pretrain.tiny import world_of_one

pytestmark = pytest.mark.slow

NUM_STEPS, STOP = 6, 3
SHARDED = {"distributed_optimizer": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 PP2 SP sharded": {"tensor": 2, "pipeline": 2, "sequence": True, **SHARDED},
    "PP2 VPP2 DP2 sharded": {"pipeline": 2, "virtual_pipeline": 2, **SHARDED},
    "TP2 DP2 sharded": {"tensor": 2, **SHARDED},
    "PP4 of 1, 1, 2 and 1 layers": {"pipeline": 4, "pipeline_layout": [1, 1, 2, 1]},
}
ALONE: dict[bool, dict[str, Any]] = {False: {}, True: SHARDED}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@dataclass
class World:
    """What the module's runs left behind."""

    corpus: Path
    folder: Path
    lines: dict[str, dict[str, Any]]

    def run_of(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")


def config_of(world: World, name: str, layout: dict[str, Any], **sections: dict[str, Any]) -> PretrainConfig:
    train = {"num_steps": NUM_STEPS, "global_batch_rows": 4, "save_interval": STOP, "eval_interval": STOP}
    train |= sections.pop("train", {})
    model = {"num_layers": 5, "num_attention_heads": 4} | sections.pop("model", {})
    return small_config(world.corpus, world.run_of(name), parallel=layout, train=train, model=model, **sections)


def save_of(world: World, name: str, step: int) -> Path:
    return world.run_of(name) / "checkpoints" / f"step_{step:08d}"


def is_sharded(layout: dict[str, Any]) -> bool:
    return bool(layout.get("distributed_optimizer", False))


def reference(layout: dict[str, Any]) -> str:
    return f"alone {is_sharded(layout)}"


@pytest.fixture(scope="module")
def alone() -> Iterator[Place]:
    """A world of one for this module's own runs, ended before later modules start theirs."""
    if dist.is_initialized():
        parallel.stop_processes()
    with world_of_one() as place:
        yield place


def jobs_of(world: World) -> list[Job]:
    jobs = []
    for name, layout in LAYOUTS.items():
        jobs += [
            Job(name, config_of(world, name, layout)),
            Job(f"{name} resumed", config_of(world, f"{name} resumed", layout), start=str(save_of(world, name, STOP))),
            Job(
                f"{name} from alone",
                config_of(world, f"{name} from alone", layout),
                start=str(save_of(world, reference(layout), STOP)),
            ),
        ]
    both = LAYOUTS["TP2 PP2 SP sharded"]
    whole = config_of(world, "dropout", both, model=DROPOUT, train={"precision": "bf16", "num_steps": STOP + 1})
    resumed = replace(whole, run=replace(whole.run, dir=str(world.run_of("dropout resumed"))))
    poisoned = config_of(world, "poisoned", both, train={"num_steps": 3, "eval_interval": 0, "save_interval": 0})
    evaluated = config_of(world, "evaluated", both)
    return [
        *jobs,
        Job("dropout", whole),
        Job("dropout resumed", resumed, start=str(save_of(world, "dropout", STOP))),
        Job("poisoned", poisoned, poisoned_rank=3),
        Job("evaluated", evaluated, evaluate=str(save_of(world, "alone True", NUM_STEPS))),
        Job("uninterrupted", launched_config(world, "uninterrupted")),
    ]


def launched_config(world: World, name: str) -> PretrainConfig:
    train = {"num_steps": 20, "eval_interval": 8, "save_interval": 0}
    return config_of(world, name, LAYOUTS["TP2 PP2 SP sharded"], train=train)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, alone: Place) -> World:
    folder = tmp_path_factory.mktemp("world")
    world = World(write_corpus(folder / "corpus"), folder, {})
    for layout in ALONE.values():
        run(begin(config_of(world, reference(layout), layout), alone))
    world.lines = run_jobs(jobs_of(world), 4, folder)
    return world


def assert_close(found: Rows, expected: Rows) -> None:
    """Rows agree to rounding; the data stream and what is counted agree exactly."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if key in ("step", "epoch", "consumed_rows", "consumed_residues", "skipped_steps", "masked_accuracy"):
                assert one[key] == value, key
            else:
                assert one[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_resumed_under_its_own_layout_is_bit_equal(name: str, world: World) -> None:
    whole, resumed = rows_of(world.run_of(name)), rows_of(world.run_of(f"{name} resumed"))
    assert [row["step"] for row in whole if "loss" in row] == list(range(1, NUM_STEPS + 1))
    assert [row for row in resumed if row["step"] > STOP] == [row for row in whole if row["step"] > STOP]
    # The copied save came without a log: its validation is made again.
    assert [row for row in resumed if row["step"] == STOP] == [
        row for row in whole if row["step"] == STOP and "validation_loss" in row
    ]
    expected, found = (saved_tensors(save_of(world, run, NUM_STEPS)) for run in (name, f"{name} resumed"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_logs_and_saves_what_one_process_does(name: str, world: World) -> None:
    alone = reference(LAYOUTS[name])
    assert_close(rows_of(world.run_of(name)), rows_of(world.run_of(alone)))
    for step in (STOP, NUM_STEPS):
        expected, found = (read_state(save_of(world, run, step)) for run in (alone, name))
        assert found.position == expected.position
        assert (found.consumed_rows, found.consumed_residues) == (expected.consumed_rows, expected.consumed_residues)
        assert found.recent_losses == pytest.approx(expected.recent_losses, rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_weights_and_moments_are_those_of_one_process(name: str, world: World) -> None:
    expected = saved_tensors(save_of(world, reference(LAYOUTS[name]), NUM_STEPS))
    found = saved_tensors(save_of(world, name, NUM_STEPS))
    assert found.keys() == expected.keys()
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in expected) > 30
    for key, tensor in expected.items():
        largest = float(tensor.double().abs().max())
        difference = float((found[key].double() - tensor.double()).abs().max())
        assert difference <= 1e-3 * largest + 1e-9, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_of_one_process_goes_on_under_every_layout(name: str, world: World) -> None:
    expected = [row for row in rows_of(world.run_of(reference(LAYOUTS[name]))) if row["step"] > STOP]
    assert_close([row for row in rows_of(world.run_of(f"{name} from alone")) if row["step"] > STOP], expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_of_every_layout_goes_on_in_one_process(name: str, world: World, alone: Place) -> None:
    layout = ALONE[is_sharded(LAYOUTS[name])]
    config = config_of(world, f"alone from {name}", layout)
    copy_checkpoint(save_of(world, name, STOP), Path(config.run.dir))
    rows = [row for row in run(begin(config, alone)) if row["step"] > STOP]
    assert_close(rows, [row for row in rows_of(world.run_of(reference(layout))) if row["step"] > STOP])


def test_dropout_in_bf16_goes_on_bit_for_bit(world: World) -> None:
    whole, resumed = rows_of(world.run_of("dropout")), rows_of(world.run_of("dropout resumed"))
    assert [row for row in resumed if row["step"] > STOP] == [row for row in whole if row["step"] > STOP]
    plain = rows_of(world.run_of("TP2 PP2 SP sharded"))
    assert whole[0]["loss"] != plain[0]["loss"]


def test_a_nan_on_one_rank_makes_all_ranks_skip_alike(world: World) -> None:
    steps = world.lines["poisoned"]["steps"]
    assert len(steps) == 4
    for rank in steps:
        assert [step["skipped"] for step in rank] == [False, True, False]
        assert [step["changed"] for step in rank] == [True, False, True]
    rows = rows_of(world.run_of("poisoned"))
    assert [row["skipped_steps"] for row in rows if "loss" in row] == [0, 1, 1]
    assert rows[1]["loss"] is None


def test_evaluation_gives_the_same_numbers_under_another_layout(world: World) -> None:
    line = world.lines["evaluated"]
    last = rows_of(world.run_of("alone True"))[-1]
    for key in ("loss", "perplexity", "mask_perplexity"):
        assert line[key] == pytest.approx(last[f"validation_{key}"], rel=1e-5)


def launch(config: PretrainConfig, folder: Path) -> subprocess.Popen[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(config_to_yaml(config))
    words = ["launch", "local", "--nproc", "4", "--", "pretrain", "--config", str(recipe)]
    return subprocess.Popen(
        [sys.executable, "-m", "megaprot.tools.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_launched_run_that_is_preempted_saves_and_goes_on(world: World, tmp_path: Path) -> None:
    config = launched_config(world, "launched")
    folder = Path(config.run.dir)
    first = launch(config, tmp_path)
    deadline = time.monotonic() + 240
    while len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate(timeout=60)[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 0, output
    step = saved_steps(folder / "checkpoints")[0]
    assert 3 <= step < config.train.num_steps
    assert (folder / "REQUEUE").read_text() == f"step {step}\n"
    assert f"asked to stop: saved at step {step}; start the same command again to go on" in output
    assert "Traceback" not in output

    second = launch(config, tmp_path)
    output = second.communicate(timeout=240)[0]
    assert second.returncode == 0, output
    assert f"resumed from {folder}/checkpoints/step_{step:08d}" in output
    assert not (folder / "REQUEUE").exists()
    assert rows_of(folder) == rows_of(world.run_of("uninterrupted"))
