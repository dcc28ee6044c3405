"""Launching several processes on this machine: arguments, the check before spawning, exit statuses, no orphans."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaprot.launch import local

RANK_PROGRAM = '''
"""A stand-in for the program: checks when asked to, else sleeps, fails or ends as its argument says."""
import os, signal, sys, time
mode, rank = sys.argv[1], os.environ.get("RANK")
if "--check_processes" in sys.argv:
    print("checked for", sys.argv[-1], flush=True)
    sys.exit("stand-in: error: wrong input" if mode == "wrong" else 0)
open(f"{sys.argv[2]}/pid{rank}", "w").write(str(os.getpid()))
open(f"{sys.argv[2]}/port{rank}", "w").write(os.environ["MASTER_PORT"])
if mode == "fail" and rank == "1":
    sys.exit("stand-in: error: it broke" if len(sys.argv) == 3 else int(sys.argv[3]))
if mode == "save":
    def save(number, frame):
        open(f"{sys.argv[2]}/saved{rank}", "w").write(signal.Signals(number).name)
        sys.exit(0)
    signal.signal(signal.SIGUSR1, save)
if mode == "killed" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if mode != "done":
    time.sleep(120)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-in program on the module path, where its ranks leave their process ids."""
    (tmp_path / "stand_in.py").write_text(RANK_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def launch(folder: Path, mode: str, *more: str, log_dir: Path | None = None) -> subprocess.Popen[str]:
    """Start the stand-in in two ranks as the launcher does, in a process of its own."""
    command = [mode, str(folder), *more]
    check = local.check_command(2, "stand_in", command)
    ranks = local.ranks_command(2, log_dir, "stand_in", command)
    environment = os.environ | local.added_environment(2, os.environ)
    code = f"import os; from megaprot.launch import local; raise SystemExit(local.start({check}, {ranks}, os.environ))"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment)


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


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the first argument is where to start the processes: local, but got none"),
        (["slurm"], "the first argument is where to start the processes: local, not 'slurm'"),
        (["local"], "--nproc is required"),
        (["local", "--nproc", "0", "--", "pretrain"], "--nproc must be a whole number of at least 1, but got '0'"),
        (["local", "--nproc", "-2", "--", "pretrain"], "--nproc"),
        (["local", "--nproc", "two", "--", "pretrain"], "but got 'two'"),
        (["local", "--nproc", "²", "--", "pretrain"], "but got '²'"),
        (["local", "--nproc", "2", "pretrain"], "unrecognized arguments: pretrain"),
        (["local", "--nproc", "2"], "write the command after --"),
        (["local", "--nproc", "2", "--"], "write the command after --"),
        (["local", "--nproc", "2", "--", "plot"], "'plot' does not run in several processes; those that do: pretrain"),
        (["local", "--np", "2", "--", "pretrain"], "unrecognized arguments: --np 2"),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_status_2(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        local.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("megaprot launch: error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_dry_run_prints_a_command_that_a_shell_reads_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    argv = ["local", "--nproc", "4", "--log_dir", "my logs", "--dry_run", "--", "pretrain", "--run.dir", "it's here"]
    assert local.main(argv) == 0
    words = shlex.split(capsys.readouterr().out)
    at = words.index(sys.executable)
    assert "OMP_NUM_THREADS=2" in words[:at]  # nine cores for four ranks
    torchrun = ["--standalone", "--nproc-per-node", "4", "--log-dir", "my logs", "--tee", "3"]
    command = ["-m", "megaprot.tools.cli", "pretrain", "--run.dir", "it's here"]
    assert words[at + 1 :] == ["-m", "megaprot.launch.ranks", *torchrun, *command]


def test_threads_are_the_cores_shared_out_unless_set() -> None:
    cores = len(os.sched_getaffinity(0))
    assert local.added_environment(1, {})["OMP_NUM_THREADS"] == str(cores)
    assert local.added_environment(10 * cores, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in local.added_environment(1, {"OMP_NUM_THREADS": "5"})


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


def test_a_failed_rank_ends_the_others_and_gives_its_status(folder: Path) -> None:
    process = launch(folder, "fail", "6")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 6
    assert error == "megaprot launch: rank 1 ended with exit status 6; its message is above\n"
    assert not alive(int((folder / "pid0").read_text()))


def test_a_killed_rank_is_named_with_the_signal(folder: Path) -> None:
    process = launch(folder, "killed")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 0 was killed by SIGKILL" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_launcher_leaves_no_orphans(folder: Path, number: signal.Signals) -> None:
    process = launch(folder, "sleep")
    wait_for([folder / "pid0", folder / "pid1"])
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not any(alive(int((folder / f"pid{rank}").read_text())) for rank in (0, 1))


def test_a_preemption_signal_reaches_every_rank(folder: Path) -> None:
    process = launch(folder, "save")
    wait_for([folder / "pid0", folder / "pid1"])
    time.sleep(0.3)  # the ranks write their ids just before they listen for the signal
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert [(folder / f"saved{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]


def test_output_goes_to_files_and_the_terminal_with_a_log_folder(folder: Path) -> None:
    process = launch(folder, "fail", log_dir=folder / "logs")
    _, error = process.communicate(timeout=60)
    assert "stand-in: error: it broke" in error
    written = [file.read_text() for file in (folder / "logs").rglob("stderr.log")]
    assert sorted(text.strip() for text in written) == ["", "stand-in: error: it broke"]


def test_help_is_answered_without_starting_anything(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["local", "-h"]):
        with pytest.raises(SystemExit) as stopped:
            local.main(argv)
        assert stopped.value.code == 0
        assert "--nproc N" in capsys.readouterr().out
