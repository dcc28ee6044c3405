"""The lock of a run's folder, taken by real processes that end, are killed or fork."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megaprot.common import run_lock
from megaprot.common.errors import RunError
from megaprot.common.run_lock import LOCK, held

HOLDER = """
import os, sys, time
from pathlib import Path
from megaprot.common.run_lock import held
with held(Path(sys.argv[1])):
    if os.fork() == 0:  # as the loaders of a run, which may outlive it for a moment
        print(os.getpid(), flush=True)
        time.sleep(600)
    time.sleep(600)
"""


def test_a_folder_is_held_until_its_process_dies_even_if_children_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", -1.0)
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RunError) as refused, held(folder):
            pass
        assert str(refused.value) == (
            f"{folder} is held by another run or an earlier start ({socket.gethostname()} process {holder.pid}); stop "
            f"that one or name another folder, or if there is none remove {folder / LOCK}."
        )
        holder.kill()
        holder.wait()
        with held(folder):
            assert (folder / LOCK).read_text() == f"{socket.gethostname()} process {os.getpid()}\n"
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_the_lock_of_another_host_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Another host's lock, as its server tells of it: taken twice, then free.
    (tmp_path / LOCK).write_text("node7 process 12 of job 3\n")
    answers = [BlockingIOError(11, "taken"), BlockingIOError(11, "taken"), None]

    def lock(stream: object, operation: int) -> None:
        if answer := answers.pop(0):
            raise answer

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    with held(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{socket.gethostname()} process {os.getpid()} of job 4\n"
    expected = f"{tmp_path} is held by another run or an earlier start (node7 process 12 of job 3)"
    assert capsys.readouterr().out == f"{expected}; waiting for its end\n"
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", -1.0)
    (tmp_path / LOCK).write_text("node7 process 12\n")
    answers.append(BlockingIOError(11, "taken"))
    with pytest.raises(RunError, match=r"earlier start \(node7 process 12\); stop that one"), held(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lock(stream: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lock)
    with held(tmp_path):
        pass
    assert "knows no locks (No locks available); see that no other run writes to it" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"), held(tmp_path / "file" / "run"):
        pass
