"""Saves written in a thread: of the tensors as they were, while steps are taken, and found whole or not at all."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from megaprot.common.errors import RunError
from megaprot.pretrain import checkpoint
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.training import Training
from tests.pretrain.runs import begin, run, saved_tensors, small_config, write_corpus
from tests.pretrain.test_checkpoint import file_size_limit

BACKGROUND = {"background_saves": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("background") / "corpus")


def delay_writes(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Any]) -> None:
    """Let every write begin with ``wait``."""
    in_host_memory = checkpoint.in_host_memory

    def delayed(*arguments: Any) -> Callable[[], None]:
        write = in_host_memory(*arguments)

        def late() -> None:
            wait()
            write()

        return late

    monkeypatch.setattr(checkpoint, "in_host_memory", delayed)


def test_what_is_saved_is_what_there_was_when_the_save_began(
    corpus: Path, tmp_path: Path, alone: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begin(small_config(corpus, tmp_path / "run", train=BACKGROUND), alone)
    steps = training.steps()
    for _ in range(2):  # so that the optimizer has its moments
        step, rows, _ = next(steps)
        training.take_step(step, rows, [0.0])
    training.state.recent_losses = []
    at_once = checkpoint.Save(
        *(tmp_path, training.chunks, training.optimizer, training.state, training.config), training.blend.vocabulary
    )
    expected = saved_tensors(at_once.finish())
    gate = Event()
    delay_writes(monkeypatch, gate.wait)
    training.state.step = 3
    training.save()
    assert not training.has_written
    assert checkpoint.saved_steps(training.checkpoints) == []
    training.state.step, training.state.recent_losses = 4, [1.0]
    waited = training.stragglers.seconds_waited
    step, rows, _ = next(steps)
    assert training.stragglers.seconds_waited == waited > 0, "a wait beside the writing thread makes a straggler"
    training.take_step(step, rows, [0.0])  # changes weights and moments
    gate.set()
    training.finish_save()
    newest = checkpoint.newest_complete(training.checkpoints)
    assert newest == checkpoint.step_folder(training.checkpoints, 3)
    assert (training.saved_step, checkpoint.read_state(newest).recent_losses) == (3, [])
    found = saved_tensors(newest)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_goes_on_while_it_saves_and_is_the_same_run(
    corpus: Path, tmp_path: Path, alone: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"num_steps": 12, "save_interval": 3, "eval_interval": 0}
    rows = run(begin(small_config(corpus, tmp_path / "at_once", train=train), alone))
    finished: list[tuple[int, int]] = []
    finish_save = Training.finish_save

    def told(self: Training) -> None:
        before = self.saved_step
        finish_save(self)
        if self.saved_step != before:
            finished.append((self.saved_step, self.state.step))

    monkeypatch.setattr(Training, "finish_save", told)
    delay_writes(monkeypatch, lambda: time.sleep(0.05))
    assert run(begin(small_config(corpus, tmp_path / "later", train=train | BACKGROUND), alone)) == rows
    assert [step for step, _ in finished] == [3, 6, 9, 12]
    assert all(at > step for step, at in finished[:3]), "a save held up its step"
    for step in (3, 6, 9, 12):
        folders = (checkpoint.step_folder(tmp_path / name / "checkpoints", step) for name in ("at_once", "later"))
        ours, theirs = (saved_tensors(folder) for folder in folders)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), step
        assert checkpoint.read_state(checkpoint.step_folder(tmp_path / "later" / "checkpoints", step)).step == step


def test_a_disk_that_is_full_in_the_background_is_named_and_older_saves_are_kept(
    corpus: Path, tmp_path: Path, alone: Place
) -> None:
    training = begin(small_config(corpus, tmp_path / "run", train=BACKGROUND), alone)
    training.state.step = 2
    training.save()
    training.finish_save()
    training.state.step = 4
    with file_size_limit(100_000):
        training.save()
        with pytest.raises(RunError, match=r"step_00000004 could not be written .* free the disk"):
            training.finish_save()
    assert checkpoint.newest_complete(training.checkpoints) == checkpoint.step_folder(training.checkpoints, 2)
    training.save()
    training.finish_save()
    assert checkpoint.newest_complete(training.checkpoints) == checkpoint.step_folder(training.checkpoints, 4)
