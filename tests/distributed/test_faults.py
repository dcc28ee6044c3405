"""Ranks that die, stop, or are told to end: noticed, named once, replaced, and the losses are those of a whole run.

``make test-faults`` kills at 20 random moments; MEGAPROT_NUM_FAULTS gives their number.
"""

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megaprot.common import run_lock
from megaprot.common.errors import InputError, RunError
from megaprot.common.metrics_log import read_metrics
from megaprot.common.watched import watched
from megaprot.pretrain.checkpoint import newest_complete, saved_steps
from megaprot.pretrain.config import PretrainConfig
from tests.distributed.launched import Launched
from tests.pretrain.runs import rows_of, small_config, write_corpus

pytestmark = pytest.mark.slow

NUM_FAULTS = int(os.environ.get("MEGAPROT_NUM_FAULTS", "3"))
SILENT_SECONDS = 8
TP2 = {"tensor": 2}  # each rank writes a shard
CONSTANT = {"decay": "constant"}  # the length of a run then changes nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus")
    return folder


def config_of(folder: Path, name: str, num_steps: int = 100_000, **sections: dict[str, Any]) -> PretrainConfig:
    """Two data-parallel ranks, saves every tenth step."""
    train = {"num_steps": num_steps, "save_interval": 10, "eval_interval": 0, "keep_checkpoints": 2}
    return small_config(
        folder / "corpus", folder / name, optim=CONSTANT, train=train | sections.pop("train", {}), **sections
    )


def assert_like_an_uninterrupted_run(folder: Path, name: str, launched: list[Launched], **sections: Any) -> None:
    """The rows of run ``name`` are, bit for bit, those of a run of as many steps that nothing happened to."""
    found = [row for row in rows_of(folder / name) if "loss" in row]
    whole = Launched(config_of(folder, f"{name}_whole", len(found), train={"save_interval": 0}, **sections), 2)
    launched.append(whole)
    assert whole.finish() == 0, whole.output
    assert found == [row for row in rows_of(folder / f"{name}_whole") if "loss" in row]


def test_dead_and_stopped_ranks_are_named_and_replaced_and_a_signal_to_all_processes_saves(
    folder: Path, launched: list[Launched]
) -> None:
    config = config_of(folder, "run", data={"num_workers": 1})
    run = Launched(
        config, 2, "--max_restarts", "2", "--silent_seconds", str(SILENT_SECONDS), "--log_dir", f"{folder}/logs"
    )
    launched.append(run)
    run.wait_for(lambda: run.step() >= 12, "twelve steps")
    run.ranks()[1].send_signal(signal.SIGKILL)
    run.wait_for(lambda: "resumed from" in run.output, "the second start")
    assert re.search(r"launch: rank 1 on \S+ was killed by SIGKILL, after step \d+ .*\(1 of at most 2\)\n", run.output)

    first = run.step()
    run.wait_for(lambda: run.step() >= first + 12, "steps of the second start")
    run.ranks()[0].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    run.wait_for(lambda: "no sign of life" in run.output, "a report of the stopped rank")
    assert time.monotonic() - stopped < SILENT_SECONDS + 15
    assert re.search(
        rf"launch: rank 0 on \S+ has shown no sign of life for {SILENT_SECONDS} s, after step \d+; the stacks .* "
        rf"{folder}/logs; starting again from the last save \(2 of at most 2\)\n",
        run.output,
    )
    assert "accumulate_gradients" in (folder / "logs" / "stacks_1.txt").read_text()

    run.wait_for(lambda: run.output.count("resumed from") == 2, "the third start")
    first = run.step()
    run.wait_for(lambda: run.step() >= first + 5, "steps of the third start")
    family = run.family()
    assert len(family) >= 4  # two ranks, two loaders
    for process in family:  # as Slurm does at the end of a job
        process.send_signal(signal.SIGTERM)
    assert run.finish(90) == 0, run.output
    assert not run.left_over()
    step = saved_steps(folder / "run" / "checkpoints")[0]
    assert run.step() == step
    assert (folder / "run" / "REQUEUE").read_text() == f"step {step}\n"
    assert run.output.count("megaprot launch: ") == 2
    assert "Traceback" not in run.output
    assert "[rank 1]" not in run.output  # victims say nothing
    logs = [read.read_text() for read in sorted((folder / "logs").glob("rank_*.log"))]
    assert [text.count("\nlayout ") for text in logs] == [3, 0]
    assert_like_an_uninterrupted_run(folder, "run", launched)


def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(folder: Path, launched: list[Launched]) -> None:
    random_moments = random.Random(1234)
    config = config_of(folder, "random", train={"save_interval": 5})
    run = Launched(config, 2, "--max_restarts", str(NUM_FAULTS), "--silent_seconds", "30")
    launched.append(run)
    for fault in range(NUM_FAULTS):
        run.wait_for(lambda: len(run.ranks()) == 2, f"ranks of start {fault + 1}")
        seconds = random_moments.uniform(0, 25)
        end = time.monotonic() + seconds
        run.wait_for(lambda end=end: time.monotonic() > end, "the moment")  # type: ignore[misc]
        victim = random_moments.randrange(2)
        run.ranks()[victim].send_signal(signal.SIGKILL)
        run.wait_for(lambda fault=fault: f"({fault + 1} of at most" in run.output, "restart")  # type: ignore[misc]
        assert f"rank {victim} on " in run.output.splitlines()[-1] or f"launch: rank {victim} on " in run.output
    run.wait_for(lambda: len(run.ranks()) == 2, "ranks of the last start")
    first = run.step()
    run.wait_for(lambda: run.step() >= first + 12, "steps of the last start")
    run.process.send_signal(signal.SIGUSR1)
    assert run.finish(90) == 0, run.output
    assert not run.left_over()
    assert_like_an_uninterrupted_run(folder, "random", launched)


def test_a_rank_killed_while_saves_are_written_in_the_background_costs_the_steps_since_the_last_one(
    folder: Path, launched: list[Launched]
) -> None:
    # The distributed optimizer is saved whole by one rank: the others are far ahead of it.
    sections: dict[str, Any] = {"parallel": {"distributed_optimizer": True}}
    config = config_of(folder, "background", train={"save_interval": 4, "background_saves": True}, **sections)
    run = Launched(config, 2, "--max_restarts", "2")
    launched.append(run)
    for fault in (1, 2):
        first = run.step()
        run.wait_for(lambda first=first: run.step() >= first + 10, "ten steps")  # type: ignore[misc]
        run.ranks()[fault % 2].send_signal(signal.SIGKILL)
        run.wait_for(lambda fault=fault: f"({fault} of at most 2)" in run.output, "restart")  # type: ignore[misc]
    run.wait_for(lambda: run.output.count("resumed from") == 2, "the last start")
    first = run.step()
    run.wait_for(lambda: run.step() >= first + 6, "steps of the last start")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(90) == 0, run.output
    assert saved_steps(folder / "background" / "checkpoints")[0] == run.step()
    assert "passed over" not in run.output
    assert not list((folder / "background" / "checkpoints").glob(".*"))
    assert_like_an_uninterrupted_run(folder, "background", launched, **sections)


KILLER = '''
"""Kills a rank in the middle of a save: at the n-th start the victim of the n-th moment of the plan."""
import json, os, signal
from pathlib import Path
folder, rank = os.environ.get("KILL_FOLDER"), os.environ.get("RANK")
if folder and rank and b"megaprot.tools.cli" in Path("/proc/self/cmdline").read_bytes():
    starts = Path(folder) / f"starts_{rank}"
    with starts.open("a") as stream:
        stream.write("x")
    plan = json.loads((Path(folder) / "plan.json").read_text())[len(starts.read_text()) - 1 :]
    victim, moment = plan[0] if plan else (-1, "")
    for name in ("fsync", "rename", "replace", "unlink") if int(rank) == victim else ():
        def call(target, *more, _name=name, _original=getattr(os, name), **options):
            path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
            if f"{_name} {path.name}".startswith(moment):
                if _name == "fsync":
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return _original(target, *more, **options)
        setattr(os, name, call)
'''
MOMENTS = [(1, "fsync __1_0"), (0, "replace .manifest.json"), (0, "rename .step_"), (0, "rename step_")]


def test_a_rank_killed_in_the_middle_of_a_save_costs_the_steps_since_the_last_one_alone(
    folder: Path, launched: list[Launched]
) -> None:
    (folder / "killer").mkdir()
    (folder / "killer" / "sitecustomize.py").write_text(KILLER)
    (folder / "killer" / "plan.json").write_text(json.dumps(MOMENTS))
    config = config_of(folder, "torn", train={"save_interval": 5, "keep_checkpoints": 1}, parallel=TP2)
    path = f"{folder}/killer:{os.environ.get('PYTHONPATH', '')}"
    run = Launched(config, 2, "--max_restarts", "4", KILL_FOLDER=f"{folder}/killer", PYTHONPATH=path)
    launched.append(run)
    run.wait_for(lambda: "(4 of at most 4)" in run.output, "four faults", 300)
    run.wait_for(lambda: run.output.count("\nlayout ") == 5, "the last start")
    first = run.step()
    run.wait_for(lambda: run.step() >= first + 6, "steps of the last start")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(90) == 0, run.output
    victims = re.findall(r"launch: rank (\d) on \S+ was killed by SIGKILL, after step (\d+)", run.output)
    # Killed before the rename, the save of step 5 or 10 is lost; afterwards only the older one was being removed.
    assert victims[0] == ("1", "5") and victims[1:3] == [("0", "5"), ("0", "5")] and victims[3] == ("0", "10")
    resumed = re.findall(r"resumed from .*step_(\d+)\n", run.output)
    assert [int(step) for step in resumed] == [10]
    assert "passed over" not in run.output
    assert not list((folder / "torn" / "checkpoints").glob(".*"))
    assert_like_an_uninterrupted_run(folder, "torn", launched, parallel=TP2)


def test_a_run_that_gives_up_is_not_started_again(folder: Path, launched: list[Launched]) -> None:
    skipping = {"spike_window": 1, "spike_sigma": 1e-9, "max_skipped_steps": 1, "num_steps": 50}
    config = config_of(folder, "gave_up", train=skipping)
    config.optim.lr = config.optim.min_lr = 10.0
    run = Launched(config, 2, "--max_restarts", "3")
    launched.append(run)
    assert run.finish() == 1, run.output
    assert "steps in a row were skipped" in run.output
    assert "starting again" not in run.output
    assert not read_metrics(folder / "gave_up" / "absent")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_rank_that_cannot_write_its_shard_ends_the_run_with_one_message_and_keeps_older_saves(
    in_background: bool, folder: Path, launched: list[Launched]
) -> None:
    checkpoints = folder / f"full_{in_background}" / "checkpoints"
    config = config_of(folder, checkpoints.parent.name, parallel=TP2, train={"background_saves": in_background})
    run = Launched(config, 2, "--max_restarts", "3")
    launched.append(run)
    run.wait_for(lambda: saved_steps(checkpoints), "the first save")
    kept = saved_steps(checkpoints)[0]
    run.ranks()[1].rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))  # as on a full disk
    assert run.finish(120) == 1, run.output
    assert len(re.findall(r"error: the checkpoint \S+ could not be written \(.*\); free the disk", run.output)) == 1
    assert run.output.count("megaprot launch: ") == 1
    assert "Traceback" not in run.output
    assert saved_steps(checkpoints)[0] >= kept
    assert newest_complete(checkpoints) is not None
    assert not run.left_over()


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(
    folder: Path, launched: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Launched(config_of(folder, "held"), 2)
    launched.append(first)
    first.wait_for(lambda: first.step() >= 2, "two steps")
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 1.0)
    rank_0 = first.ranks()[0].pid
    with pytest.raises(RunError, match=rf"held by another run .* process {rank_0}\)"), watched(str(folder / "held")):
        raise AssertionError("it began")
    step = first.step()
    first.wait_for(lambda: first.step() >= step + 2, "two more steps")
    first.process.send_signal(signal.SIGTERM)
    assert first.finish(90) == 0, first.output
    with watched(str(folder / "held")):  # free again
        pass


def test_a_run_folder_that_is_not_shared_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaprot.pretrain import shared_folder
    from megaprot.pretrain.parallel import Place

    place = Place(1, 2, 1, 2, 0, 0, 1, device=None)  # type: ignore[arg-type]
    monkeypatch.setattr(
        shared_folder.dist, "broadcast_object_list", lambda values, src: values.__setitem__(0, ".seen-x")
    )

    def gather(found: list[Any], mine: str) -> None:
        found[:] = ["", mine]

    monkeypatch.setattr(shared_folder.dist, "all_gather_object", gather)
    with pytest.raises(
        InputError, match=r"run\.dir .*elsewhere on \S+ \(rank 1\) is not the folder that rank 0 writes to"
    ):
        shared_folder.require_shared(folder / "elsewhere", place)
