"""Launching several processes on this machine: arguments, the check, exit statuses, faults, restarts, no orphans."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megaprot.launch import __main__ as launch_program
from megaprot.launch import local_job
from megaprot.launch.commands import check_arguments, program

RANK_PROGRAM = '''
"""A stand-in for the program: checks when asked to, else sleeps, fails or ends as its argument says."""
import os, signal, subprocess, sys, time
from pathlib import Path
from megaprot.common import heartbeat
mode, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ.get("RANK")
if "--check_processes" in sys.argv:
    print("checked for", sys.argv[-1], flush=True)
    sys.exit("stand-in: error: wrong input" if mode == "wrong" else 0)
with (folder / f"pid{rank}").open("a") as file:
    file.write(f"{os.getpid()}\\n")
(folder / f"port{rank}").write_text(os.environ["MASTER_PORT"])
starts = len((folder / f"pid{rank}").read_text().split())
heartbeat.start()
heartbeat.mark("training", 7)
if mode == "fail" and rank == "1":
    sys.exit("stand-in: error: it broke" if len(sys.argv) == 3 else int(sys.argv[3]))
if mode == "gives up" and rank == "1":
    heartbeat.mark(heartbeat.GAVE_UP)
    sys.exit(1)
if mode in ("save", "stubborn"):
    def save(number, frame):
        (folder / f"saved{rank}").write_text(signal.Signals(number).name)
        sys.exit(0) if mode == "save" else None
    signal.signal(signal.SIGUSR1, save)
if mode == "killed" and rank == "0" or mode == "killed once" and rank == "0" and starts == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "lost" and rank == "1":
    (folder / "victim").write_text("")
    sys.exit(3)
if mode == "lost":
    time.sleep(1)
    sys.exit(9)
if mode == "child":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    (folder / f"child{rank}").write_text(str(child.pid))
if mode == "stopped" and rank == "1" and starts == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
if mode == "stuck":
    heartbeat.mark("reading rows" if rank == "1" else "training", 8)
    heartbeat.progress() if rank == "0" else None
if mode not in ("done", "killed once") and not (mode == "stopped" and starts == 2):
    time.sleep(120)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-in program on the module path, where its ranks leave their process ids."""
    (tmp_path / "stand_in.py").write_text(RANK_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def launch(folder: Path, mode: str, *more: str, max_restarts: int = 0, **options: Any) -> subprocess.Popen[str]:
    """Start the stand-in in two ranks as the launcher does, in a process of its own."""
    command = program([mode, str(folder), *more], "stand_in")
    check = [*command, *check_arguments(2)]
    code = (
        "import os; from megaprot.launch import local_job; from megaprot.launch.supervisor import Node; "
        f"node = Node({command}, 2, **{ {'last_words_seconds': 2.0} | options }); "
        f"raise SystemExit(local_job.start({check}, node, dict(os.environ), {max_restarts}))"
    )
    environment = os.environ | local_job.added_environment(2, os.environ)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment)


def process_ids(folder: Path) -> list[int]:
    """The ids of all ranks of all starts."""
    return [int(word) for file in folder.glob("pid*") for word in file.read_text().split()]


def wait_for(files: list[Path]) -> None:
    """Wait until all files are written, at most a minute."""
    end = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end, f"none of {files} after a minute"
        time.sleep(0.05)


def alive(process_id: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_over(process_ids: list[int]) -> list[int]:
    """Those of the processes that are still there ten seconds later: a killed one takes a while on a busy machine."""
    end = time.monotonic() + 10
    while (left := list(filter(alive, process_ids))) and time.monotonic() < end:
        time.sleep(0.05)
    return left


WHERE = "the first argument is where to start the processes, one of local, slurm, node"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], f"{WHERE}: but got none"),
        (["cloud"], f"{WHERE}: not 'cloud'"),
        (["local"], "the following arguments are required: --nproc"),
        (
            ["local", "--nproc", "0", "--", "pretrain"],
            "argument --nproc: must be a whole number of at least 1, but got '0'",
        ),
        (["local", "--nproc", "-2", "--", "pretrain"], "--nproc"),
        (["local", "--nproc", "two", "--", "pretrain"], "but got 'two'"),
        (["local", "--nproc", "²", "--", "pretrain"], "but got '²'"),
        (["local", "--nproc", "2", "--max-restarts", "-1", "--", "pretrain"], "at least 0, but got '-1'"),
        (["local", "--nproc", "2", "pretrain"], "unrecognized arguments: pretrain"),
        (["local", "--nproc", "2"], "write the command after --"),
        (["local", "--nproc", "2", "--"], "write the command after --"),
        (["local", "--nproc", "2", "--", "plot"], "'plot' does not run in several processes; those that do: pretrain"),
        (["local", "--np", "2", "--", "pretrain"], "required: --nproc"),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_status_2(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch_program.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("megaprot launch: error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_dry_run_prints_commands_that_a_shell_reads_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    argv = ["local", "--nproc", "4", "--log_dir", "my logs", "--dry_run", "--", "pretrain", "--run.dir", "it's here"]
    assert launch_program.main(argv) == 0
    check, rank = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    at = rank.index(sys.executable)
    assert "OMP_NUM_THREADS=2" in rank[:at]  # nine cores for four ranks
    command = ["-m", "megaprot.tools.cli", "pretrain", "--run.dir", "it's here"]
    assert rank[at + 1 :] == command
    assert check[at + 1 :] == [*command, "--check_processes", "4"]


def test_threads_are_the_cores_shared_out_unless_set() -> None:
    cores = len(os.sched_getaffinity(0))
    assert local_job.added_environment(1, {})["OMP_NUM_THREADS"] == str(cores)
    assert local_job.added_environment(10 * cores, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in local_job.added_environment(1, {"OMP_NUM_THREADS": "5"})


def test_wrong_input_is_said_once_and_nothing_is_spawned(folder: Path) -> None:
    process = launch(folder, "wrong")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 1  # the check's own status
    assert (output, error) == ("checked for 2\n", "stand-in: error: wrong input\n")
    assert not list(folder.glob("pid*"))


def test_all_ranks_run_and_two_launches_do_not_meet(folder: Path) -> None:
    folders = [folder / "a", folder / "b"]
    for each in folders:
        each.mkdir()
    processes = [launch(each, "done") for each in folders]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["checked for 2\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
    ports = [{(each / f"port{rank}").read_text() for rank in (0, 1)} for each in folders]
    assert [len(port) for port in ports] == [1, 1]
    assert ports[0] != ports[1]


def test_a_failed_rank_ends_the_others_and_gives_its_status(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = launch(folder, "fail", "6")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 6
    assert re.fullmatch(
        r"megaprot launch: rank 1 on \S+ ended with exit status 6, after step 7; its message is above\n", error
    )
    assert not left_over(process_ids(folder))


def test_a_killed_rank_is_named_with_signal_host_and_step(folder: Path) -> None:
    process = launch(folder, "killed")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert re.search(r"rank 0 on \S+ was killed by SIGKILL, after step 7", error)
    assert error.count("\n") == 1


def test_the_cause_is_named_and_not_the_rank_that_lost_it(folder: Path) -> None:
    process = launch(folder, "lost")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 9
    assert "rank 0 on " in error
    assert (folder / "victim").exists()


def test_a_fault_is_followed_by_another_start(folder: Path) -> None:
    process = launch(folder, "killed once", max_restarts=2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error.endswith("; starting again from the last save (1 of at most 2)\n")
    assert len((folder / "pid0").read_text().split()) == 2


@pytest.mark.parametrize(("mode", "starts"), [("killed", 3), ("gives up", 1)])
def test_starts_are_limited_and_what_ends_on_purpose_is_not_started_again(mode: str, starts: int, folder: Path) -> None:
    process = launch(folder, mode, max_restarts=2)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert len((folder / "pid0").read_text().split()) == starts


def test_wrong_input_found_by_a_rank_is_not_started_again(folder: Path) -> None:
    process = launch(folder, "fail", "2", max_restarts=2)
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert len((folder / "pid1").read_text().split()) == 1


def test_a_stopped_rank_is_reported_and_replaced_within_the_stated_time(folder: Path) -> None:
    started = time.monotonic()
    process = launch(folder, "stopped", max_restarts=1, silent_seconds=3.0)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert re.search(r"rank 1 on \S+ has shown no sign of life for 3 s, after step 7; .*starting again", error)
    assert time.monotonic() - started < 30
    assert not left_over(process_ids(folder))


def test_a_rank_that_does_not_get_on_is_reported_with_its_phase_and_stacks(folder: Path) -> None:
    process = launch(folder, "stuck", hang_seconds=3.0, log_folder=str(folder / "logs"))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"rank 1 on \S+ has not got on for 3 s \(phase: reading rows\), after step 8; the stacks", error)
    assert "stand_in.py" in (folder / "logs" / "stacks_1.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_launcher_leaves_no_orphans(folder: Path, number: signal.Signals) -> None:
    process = launch(folder, "child")
    wait_for([folder / "child0", folder / "child1"])
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (128 + number, 1)  # a rank may answer Ctrl-C with a traceback
    children = [int((folder / f"child{rank}").read_text()) for rank in (0, 1)]
    assert not left_over([*process_ids(folder), *children])


def test_ranks_die_with_a_launcher_that_is_killed(folder: Path) -> None:
    process = launch(folder, "sleep")
    wait_for([folder / "pid0", folder / "pid1"])
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 10
    while any(map(alive, process_ids(folder))):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_preemption_signal_reaches_every_rank_and_a_saved_run_is_a_success(folder: Path) -> None:
    process = launch(folder, "save")
    wait_for([folder / "pid0", folder / "pid1"])
    time.sleep(0.5)  # the ranks write their ids just before they listen for the signal
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert [(folder / f"saved{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]
    assert process.returncode == 0


def test_ranks_that_do_not_end_after_a_signal_are_killed_when_their_time_is_up(folder: Path) -> None:
    process = launch(folder, "stubborn", grace_seconds=1.0)
    wait_for([folder / "pid0", folder / "pid1"])
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "ranks that had not ended 1 s after SIGUSR1 were killed" in error
    assert not left_over(process_ids(folder))


def test_output_goes_to_a_file_a_rank_and_to_one_merged_view(folder: Path) -> None:
    process = launch(folder, "fail", log_folder=str(folder / "logs"))
    _, error = process.communicate(timeout=60)
    assert "[rank 1] stand-in: error: it broke\n" in error
    written = [(folder / "logs" / f"rank_0000{rank}.log").read_text() for rank in (0, 1)]
    assert written == ["", "stand-in: error: it broke\n"]


def test_help_is_answered_without_starting_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_program.main(["--help"]) == 0
    assert "slurm" in capsys.readouterr().out
    for where in ("local", "slurm", "node"):
        with pytest.raises(SystemExit) as stopped:
            launch_program.main([where, "-h"])
        assert stopped.value.code == 0
        assert "--nproc N" in capsys.readouterr().out
