"""The training loop in one process: stopped, crashed or out of time, a run goes on as if nothing had happened."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.common.metrics_log import read_metrics
from megaprot.pretrain.checkpoint import saved_steps, step_folder
from megaprot.pretrain.parallel import Place
from tests.pretrain.runs import (
    Rows,
    begin,
    replace_take_step,
    rows_of,
    run,
    saved_tensors,
    small_config,
    stop_at,
    write_corpus,
)

NUM_STEPS = 7
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
RAMP_UP = {"ramp_up_start_rows": 2, "ramp_up_increment_rows": 2, "ramp_up_steps": 6}
SHARDED = {"distributed_optimizer": True}
# A loss scale far too high: the first steps overflow, those after the stop do not.
FP16 = {"precision": "fp16", "initial_loss_scale": 2.0**15}
# A learning rate far too high makes losses jump about.
JUMPING = {"train": {"spike_window": 2, "spike_sigma": 1e-3}, "optim": {"lr": 0.3, "warmup_steps": 0}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"train": {"precision": "bf16"}},
    "fp16": {"train": FP16},
    "dropout": {"model": DROPOUT},
    "sharded": {"parallel": SHARDED},
    "sharded bf16": {"parallel": SHARDED, "train": {"precision": "bf16"}, "model": DROPOUT},
    "sharded fp16": {"parallel": SHARDED, "train": FP16},
    "ramp-up": {"train": RAMP_UP},
    "spike window": JUMPING,
    "proteinlm": {"model": {"position_embedding": "learned", "activation": "gelu_tanh", "token_dropout": True}},
    "recompute": {"train": {"recompute": "full"}, "model": DROPOUT},
}


def skips_before_and_after_the_stop(rows: Rows) -> bool:
    skipped = [row["skipped_steps"] for row in rows]
    return 0 < skipped[2] < skipped[-1] < NUM_STEPS


# What the steps of a variant must show for its test to mean anything.
SHOWN: dict[str, Callable[[Rows], bool]] = {
    "fp32": lambda rows: 0 < rows[2]["epoch"] < rows[-1]["epoch"],
    "fp16": lambda rows: rows[2]["skipped_steps"] > 0 and rows[-1]["skipped_steps"] < NUM_STEPS,
    "sharded fp16": lambda rows: rows[2]["skipped_steps"] > 0 and rows[-1]["skipped_steps"] < NUM_STEPS,
    "spike window": skips_before_and_after_the_stop,
    "ramp-up": lambda rows: [row["consumed_rows"] for row in rows] == [2, 4, 8, 12, 18, 24, 32],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def last_save(folder: Path) -> dict[str, torch.Tensor]:
    return saved_tensors(step_folder(folder / "checkpoints", NUM_STEPS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(variant: str, corpus: Path, tmp_path: Path, alone: Place) -> None:
    sections = VARIANTS[variant]
    sections = sections | {"train": {"num_steps": NUM_STEPS, "save_interval": 0} | sections.get("train", {})}
    whole = run(begin(small_config(corpus, tmp_path / "whole", **sections), alone))
    steps = [row for row in whole if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    assert SHOWN.get(variant, bool)(steps)

    stopped = small_config(corpus, tmp_path / "stopped", **sections)
    training = begin(stopped, alone)
    stop_at(training, 3)
    assert run(training) == [row for row in whole if row["step"] <= 3]
    assert (tmp_path / "stopped" / "REQUEUE").read_text() == "step 3\n"
    assert saved_steps(tmp_path / "stopped" / "checkpoints") == [3]

    assert run(begin(stopped, alone)) == whole
    assert not (tmp_path / "stopped" / "REQUEUE").exists()
    expected, found = last_save(tmp_path / "whole"), last_save(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("step", [4, 7])
def test_a_validation_that_a_stop_left_out_is_made_up_for(
    step: int, corpus: Path, tmp_path: Path, alone: Place
) -> None:
    sections = {"train": {"num_steps": NUM_STEPS, "save_interval": 0}}
    whole = run(begin(small_config(corpus, tmp_path / "whole", **sections), alone))
    stopped = small_config(corpus, tmp_path / "stopped", **sections)
    training = begin(stopped, alone)
    stop_at(training, step)
    assert "validation_loss" not in run(training)[-1]
    assert run(begin(stopped, alone)) == whole
    assert run(begin(stopped, alone)) == whole  # once, not at every start


def test_a_run_stopped_at_the_end_of_an_epoch_goes_on_in_the_next(corpus: Path, tmp_path: Path, alone: Place) -> None:
    a_row_each = write_corpus(tmp_path / "corpus", [78] * 24)
    whole = run(begin(small_config(a_row_each, tmp_path / "whole"), alone))
    stopped = small_config(a_row_each, tmp_path / "stopped")
    training = begin(stopped, alone)
    stop_at(training, 3)
    run(training)
    assert training.state.position["corpora"] == [{"epoch": 1, "row": 0}]
    assert run(begin(stopped, alone)) == whole


def test_loader_processes_change_nothing(corpus: Path, tmp_path: Path, alone: Place) -> None:
    sections: dict[str, dict[str, Any]] = {"model": DROPOUT, "train": {"num_steps": 5}}
    whole = run(begin(small_config(corpus, tmp_path / "none", **sections), alone))
    training = begin(small_config(corpus, tmp_path / "one", **sections), alone)
    stop_at(training, 3)
    run(training)
    assert run(begin(small_config(corpus, tmp_path / "one", **sections, data={"num_workers": 1}), alone)) == whole


def test_a_crashed_run_takes_the_steps_after_its_last_save_again(corpus: Path, tmp_path: Path, alone: Place) -> None:
    whole = run(begin(small_config(corpus, tmp_path / "whole"), alone))
    config = small_config(corpus, tmp_path / "crashed")
    training = begin(config, alone)
    take_step = training.take_step

    def crash(step: int, *arguments: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return take_step(step, *arguments)

    replace_take_step(training, crash)
    with pytest.raises(KeyboardInterrupt):
        run(training)
    assert rows_of(tmp_path / "crashed")[-1]["step"] == 3
    assert saved_steps(tmp_path / "crashed" / "checkpoints") == [2]
    resumed = begin(config, alone)
    assert rows_of(tmp_path / "crashed")[-1]["step"] == 3  # nothing is dropped before the run goes on
    assert run(resumed) == whole


def test_a_finished_run_started_again_changes_nothing(corpus: Path, tmp_path: Path, alone: Place) -> None:
    config = small_config(corpus, tmp_path, train={"num_steps": 3, "keep_checkpoints": 1})
    rows = run(begin(config, alone))
    assert saved_steps(tmp_path / "checkpoints") == [3]
    assert run(begin(config, alone)) == rows
    assert saved_steps(tmp_path / "checkpoints") == [3]


def test_a_run_out_of_time_saves_and_ends_without_a_marker(corpus: Path, tmp_path: Path, alone: Place) -> None:
    config = small_config(corpus, tmp_path, train={"max_minutes": 1e-9})
    rows = run(begin(config, alone))
    assert [row["step"] for row in rows] == [1]
    assert saved_steps(tmp_path / "checkpoints") == [1]
    assert not (tmp_path / "REQUEUE").exists()


def test_rates_leave_out_the_time_of_validations_within_an_interval(
    corpus: Path, tmp_path: Path, alone: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances one second a step and a thousand a validation: rates count the former alone."""
    train = {"num_steps": 6, "log_interval": 6, "eval_interval": 4, "save_interval": 0}
    training = begin(small_config(corpus, tmp_path / "run", train=train), alone)
    now = [0.0]
    take_step, validate = training.take_step, training.validate

    def slow_step(*arguments: Any) -> Any:
        now[0] += 1.0
        return take_step(*arguments)

    def slow_validation() -> Any:
        now[0] += 1000.0
        return validate()

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    replace_take_step(training, slow_step)
    training.validate = slow_validation  # type: ignore[method-assign]
    run(training)
    (row,) = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "residues_per_second" in row)
    assert row["residues_per_second"] == pytest.approx(row["consumed_residues"] / 6, rel=1e-6)
