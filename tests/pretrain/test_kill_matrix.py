"""SIGKILL at every step of a save: the next start finds the newest complete save, and nothing older is lost."""

import shutil
from pathlib import Path

import pytest
import torch

from megaprot.pretrain.checkpoint import newest_complete, saved_steps, step_folder
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.parallel import Place
from tests.pretrain.killed_save import save_killed_at
from tests.pretrain.runs import begin, rows_of, run, saved_tensors, small_config, write_corpus

pytestmark = pytest.mark.slow

TRAIN = {"save_interval": 2, "eval_interval": 0, "keep_checkpoints": 2}
PUBLISHED = "rename .step_00000006.partial"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, alone: Place) -> Path:
    """A run folder with saves of steps 2 and 4, and ``whole``, the same run uninterrupted to step 6."""
    folder = tmp_path_factory.mktemp("matrix")
    write_corpus(folder / "corpus")
    run(begin(config_of(folder, folder / "run", num_steps=4), alone))
    run(begin(config_of(folder, folder / "whole", num_steps=6, optim={"decay_steps": 6}), alone))
    return folder


def config_of(folder: Path, run_folder: Path, num_steps: int = 6, **sections: dict[str, int]) -> PretrainConfig:
    optim = {"decay_steps": 6}
    train = {**TRAIN, "num_steps": num_steps}
    return small_config(folder / "corpus", run_folder, train=train, optim=optim | sections.get("optim", {}))


def copy_of(folder: Path, name: str) -> PretrainConfig:
    """The run with its saves of steps 2 and 4, ready to go on to step 6."""
    return config_of(folder, Path(shutil.copytree(folder / "run", folder / name)))


def test_a_save_killed_at_any_moment_loses_nothing_older_and_the_next_start_goes_on(folder: Path, alone: Place) -> None:
    whole = {step: saved_tensors(step_folder(folder / "whole" / "checkpoints", step)) for step in (4, 6)}
    moments = save_killed_at(copy_of(folder, "moments"), -1)
    moments = moments[: moments.index("saved")]
    published = moments.index(PUBLISHED)
    order = ["mkdir weights", "fsync __0_0.distcp", "rename .metadata.tmp", "replace .manifest.json.partial", PUBLISHED]
    assert sorted(order, key=moments.index) == order
    assert "rename step_00000002" in moments[published:]
    assert any(moment.startswith("unlink ") for moment in moments[published:])
    for number, moment in enumerate(moments):
        config = copy_of(folder, f"killed {number}")
        run_folder = Path(config.run.dir)
        assert save_killed_at(config, number)[-1] == moment
        step = 6 if number > published else 4
        newest = newest_complete(run_folder / "checkpoints")
        assert newest == step_folder(run_folder / "checkpoints", step), moment
        assert {4, step} <= set(saved_steps(run_folder / "checkpoints")), moment
        assert step == 6 or 2 in saved_steps(run_folder / "checkpoints"), moment
        tensors = saved_tensors(newest)
        assert tensors.keys() == whole[step].keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in whole[step].items()), moment

        if number % 3 and number != published:  # to go on takes longer than to look
            shutil.rmtree(run_folder)
            continue
        resumed = begin(config, alone)
        assert resumed.state.step == step
        run(resumed)
        found, expected = ([row for row in rows_of(each) if "loss" in row] for each in (run_folder, folder / "whole"))
        assert found == expected, moment
        assert saved_steps(run_folder / "checkpoints")[:2] == [6, 4]
        assert step == 6 or not list((run_folder / "checkpoints").glob(".*"))
        shutil.rmtree(run_folder)
