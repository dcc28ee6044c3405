"""Steps that must not change the weights: hand-worked windows, and real runs that meet a NaN or a spike."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.common.errors import RunError
from megaprot.pretrain import training as training_module
from megaprot.pretrain.checkpoint import saved_steps
from megaprot.pretrain.guard import reason_to_skip, remember
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.training import Training
from tests.pretrain.runs import begin, replace_take_step, run, small_config, write_corpus

EIGHT = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]  # mean 5, standard deviation 2
FLAT = [1.0] * 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (3.0, math.nan, "gradient norm is nan"),
        (3.0, math.inf, "gradient norm is inf"),
        (16.9, 1.0, ""),  # 5 + 6 * 2 = 17
        (17.1, 1.0, "loss 17.1 is a spike"),
        (-100.0, 1.0, ""),  # a fall is none
        (5.0, 1.0059, ""),  # a flat window counts as one with a deviation of 0.1 %
        (5.0, 1.0061, "gradient norm 1.006 is a spike"),
        (17.1, math.inf, "gradient norm is inf"),
    ],
)
def test_reasons_to_skip(loss: float, grad_norm: float, reason: str) -> None:
    assert reason_to_skip(loss, grad_norm, EIGHT, FLAT, window=8, sigma=6.0) == reason


def test_a_window_of_zero_lets_spikes_pass_but_no_nan() -> None:
    assert reason_to_skip(1e9, 1e9, EIGHT, FLAT, window=0, sigma=6.0) == ""
    assert reason_to_skip(math.nan, 1.0, [], [], window=0, sigma=6.0) == "loss is nan"


@pytest.mark.parametrize(
    ("num_known", "window", "speaks"), [(15, 128, False), (16, 128, True), (3, 4, False), (4, 4, True)]
)
def test_few_steps_make_no_judgement(num_known: int, window: int, speaks: bool) -> None:
    reason = reason_to_skip(99.0, 1.0, [1.0] * num_known, [1.0] * num_known, window, sigma=6.0)
    assert bool(reason) == speaks


def test_the_window_keeps_the_newest_values() -> None:
    recent: list[float] = []
    for value in range(5):
        remember(float(value), recent, window=3)
    assert recent == [2.0, 3.0, 4.0]
    remember(9.0, recent, window=0)
    assert recent == []


def contents(training: Training) -> list[torch.Tensor]:
    """Copies of all weights, and of all that the optimizer remembers of them."""
    inner = training.optimizer.chained_optimizers[0].optimizer
    moments = [tensor for state in inner.state.values() for tensor in state.values()]
    steps = [torch.tensor(group["step"]) for group in inner.param_groups]
    return [tensor.detach().clone() for tensor in (*training.chunks[0].parameters(), *moments, *steps)]


def poison(training: Training, steps: set[int], change: Callable[[Training], Callable[[], None]]) -> list[bool]:
    """Take ``steps`` under a ``change``, which returns its undoing; the list tells which steps changed the contents."""
    take_step = training.take_step
    changed: list[bool] = []

    def take_step_watched(step: int, *arguments: Any) -> Any:
        before = contents(training)
        undo = change(training) if step in steps else lambda: None
        result = take_step(step, *arguments)
        undo()
        after = contents(training)
        changed.append(not all(map(torch.equal, before, after)))
        return result

    replace_take_step(training, take_step_watched)
    return changed


def nan_in_a_weight(training: Training) -> Callable[[], None]:
    weight = next(iter(training.chunks[0].parameters())).data.view(-1)
    true = weight[0].item()
    weight[0] = math.nan

    def undo() -> None:
        weight[0] = true

    return undo


def tenfold_loss(training: Training) -> Callable[[], None]:
    real = training_module.accumulate_gradients

    def larger(*arguments: Any) -> Any:
        result = real(*arguments)
        return replace(result, tally=replace(result.tally, loss=10 * result.tally.loss))

    module: Any = training_module
    module.accumulate_gradients = larger

    def undo() -> None:
        module.accumulate_gradients = real

    return undo


@pytest.mark.parametrize("change", [nan_in_a_weight, tenfold_loss])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_bad_step_changes_nothing_and_is_counted(
    change: Callable[[Training], Callable[[], None]],
    sharded: bool,
    corpus: Path,
    tmp_path: Path,
    alone: Place,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = {"num_steps": 5, "eval_interval": 0, "save_interval": 0, "spike_window": 2, "spike_sigma": 50.0}
    config = small_config(corpus, tmp_path, train=train, parallel={"distributed_optimizer": sharded})
    training = begin(config, alone)
    changed = poison(training, {2}, change)
    rows = run(training)
    assert changed == [True, True, False, True, True]
    assert [row["skipped_steps"] for row in rows[:5]] == [0, 0, 1, 1, 1]
    assert [row["loss"] is None for row in rows[:5]] == [False, False, True, False, False]
    assert training.state.skipped_in_a_row == 0
    assert len(training.state.recent_losses) == 2
    assert max(training.state.recent_losses) < 4.0
    said = next(line for line in capsys.readouterr().out.splitlines() if "skipped" in line)
    expected = "loss is nan" if change is nan_in_a_weight else "is a spike"
    assert said.startswith("step       3  skipped: ")
    assert expected in said
    assert said.endswith("(1 so far)")


def test_too_many_bad_steps_stop_the_run_with_its_checkpoint_kept(corpus: Path, tmp_path: Path, alone: Place) -> None:
    train = {"num_steps": 20, "eval_interval": 0, "save_interval": 4, "max_skipped_steps": 3}
    training = begin(small_config(corpus, tmp_path, train=train), alone)
    poison(training, {1, 4, 5, 6, 7, 8}, nan_in_a_weight)  # the single one does not count with the others
    with pytest.raises(
        RunError, match=r"^3 steps in a row .* step 6 \(loss is nan\); checkpoint step 4 is kept; "
    ) as error:
        run(training)
    assert str(error.value).count("\n") == 0
    assert saved_steps(tmp_path / "checkpoints") == [4]
    assert not (tmp_path / "REQUEUE").exists()


def test_without_a_checkpoint_the_message_says_so(corpus: Path, tmp_path: Path, alone: Place) -> None:
    training = begin(small_config(corpus, tmp_path, train={"max_skipped_steps": 1}), alone)
    poison(training, {0}, nan_in_a_weight)
    with pytest.raises(RunError, match="there is no checkpoint yet"):
        run(training)


def test_a_run_saved_before_its_first_good_step_goes_on(corpus: Path, tmp_path: Path, alone: Place) -> None:
    for sharded in (False, True):
        folder = tmp_path / str(sharded)
        config = small_config(corpus, folder, train={"num_steps": 4}, parallel={"distributed_optimizer": sharded})
        training = begin(config, alone)
        poison(training, {0, 1, 2, 3}, nan_in_a_weight)
        run(training)
        resumed = begin(config, alone)
        assert resumed.state.skipped_in_a_row == 4
        assert all(map(torch.equal, contents(training), contents(resumed)))


def test_a_lasting_change_of_level_is_a_spike_only_until_the_window_knows_it() -> None:
    losses, norms, skipped = [1.0 + 0.01 * (step % 3) for step in range(32)], [1.0] * 32, []
    for step in range(40):
        reason = reason_to_skip(2.0, 1.0, losses, norms, 32, 6.0)
        skipped += [step] if reason else []
        remember(2.0, losses, 32)
    assert skipped == list(range(len(skipped)))
    assert 1 <= len(skipped) < 5
