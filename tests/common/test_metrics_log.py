"""Where a run's numbers go: a file any JSON reader reads, plain lines or a bar, loggers on demand."""

import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megaprot.common.metrics_log import MetricsLog, read_metrics
from megaprot.pretrain.config import RunConfig


def rows_from(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_rows_are_strict_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(RunConfig(dir=str(tmp_path)), 0, 10)
    log.write({"step": 1, "loss": 2.5, "perplexity": math.exp(2.5)})
    log.write({"step": 2, "loss": math.nan, "perplexity": math.inf, "grad_norm": -math.inf})
    expected = [
        {"step": 1, "loss": 2.5, "perplexity": math.exp(2.5)},  # to the last bit
        {"step": 2, "loss": None, "perplexity": None, "grad_norm": None},
    ]
    assert rows_from(tmp_path) == expected  # before the log is closed: a killed run has its rows
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == expected


def test_rows_of_steps_that_will_be_taken_again_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(RunConfig(dir=str(tmp_path)), 0, 10)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step})
        log.write({"step": step, "validation_loss": 2.0 / step})
    log.close()
    resumed = MetricsLog(RunConfig(dir=str(tmp_path)), 2, 10)
    assert resumed.has(2, "validation_loss")
    assert not resumed.has(2, "else")
    assert not resumed.has(3, "validation_loss")
    resumed.write({"step": 3, "loss": 9.0})
    resumed.close()
    assert [(row["step"], row.get("loss")) for row in rows_from(tmp_path)] == [
        *((1, 1.0), (1, None), (2, 0.5), (2, None)),
        (3, 9.0),
    ]


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "lo', b"\x00\x00\x00", b'{"step": 3, "name": "\xff', b"17", b'{"loss": 1}']
)
def test_a_last_line_cut_short_is_left_out(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    log = MetricsLog(RunConfig(dir=str(tmp_path)), 2, 10)
    log.write({"step": 3})
    log.close()
    assert rows_from(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "absent") == []


def test_without_a_terminal_lines_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(RunConfig(dir=str(tmp_path)), 0, 10)
    log.say("step 1 of ten")
    log.advance(1)
    log.close()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("step 1 of ten\n", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_the_steps_of_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, errors = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", errors)
    log = MetricsLog(RunConfig(dir=str(tmp_path)), 40, 200)
    log.say("a line above the bar")
    log.advance(50)
    assert log.bar is not None
    assert (log.bar.n, log.bar.total) == (50, 200)
    log.close()
    assert "a line above the bar\n" in shown.getvalue()
    assert "50/200" in errors.getvalue()


class Recorder:
    """Stands for a logger: remembers every call as (name, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def record(*arguments: Any, **options: Any) -> "Recorder":
            self.calls.append((name, arguments, options))
            return self

        return record


def test_wandb_goes_on_in_the_run_of_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, recorder = ModuleType("wandb"), Recorder()
    wandb.init = recorder.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    same_name = tmp_path / "elsewhere" / tmp_path.name
    same_name.mkdir(parents=True)
    for folder in (tmp_path, same_name, tmp_path):
        log = MetricsLog(RunConfig(dir=str(folder), wandb_project="proteins"), 0, 10)
        log.write({"step": 3, "loss": math.nan})
        log.close()
    (_, _, options), logged, finished, (_, _, other), _, _, (_, _, again), _, _ = recorder.calls
    assert (options["project"], options["name"], options["resume"]) == ("proteins", tmp_path.name, "allow")
    assert options["id"] == again["id"] != other["id"]
    assert logged == ("log", ({"step": 3, "loss": None},), {"step": 3})
    assert finished[0] == "finish"


def test_tensorboard_gets_every_number_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorboard, recorder = ModuleType("torch.utils.tensorboard"), Recorder()
    tensorboard.SummaryWriter = recorder.open  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    log = MetricsLog(RunConfig(dir=str(tmp_path), tensorboard=True), 0, 10)
    log.write({"step": 3, "loss": 1.5})
    log.close()
    assert [name for name, _, _ in recorder.calls] == ["open", "add_scalar", "add_scalar", "close"]
    assert recorder.calls[0][1] == (str(tmp_path / "tensorboard"),)
    assert recorder.calls[2][1] == ("loss", 1.5, 3)
