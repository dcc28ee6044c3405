"""Faults planted on one machine, each found by its check, with a remedy."""

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megaprot.tools import cli
from megaprot.tools.diagnosis import devices, network, software, storage
from megaprot.tools.diagnosis.finding import Finding, as_table, count_of

QUICK = ["--disk_mb", "2", "--timeout_seconds", "60", "--least_disk_mb_per_second", "0"]


def package(folder: Path, *parts: str) -> None:
    """Put a package called apex into a folder."""
    for part in ("", *parts):
        (folder / "apex" / part).mkdir(parents=True)
        (folder / "apex" / part / "__init__.py").write_text("raise RuntimeError('imported')\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are found first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_apex_that_is_not_nvidias_is_found_without_importing_it(folder: Path) -> None:
    package(folder, "lib", "models")
    finding = software.check_apex()
    assert finding.status == "failed"
    assert str(folder / "apex") in finding.detail
    assert "pip uninstall apex" in finding.remedy


def test_nvidias_apex_is_known_by_its_parts(folder: Path) -> None:
    package(folder, "multi_tensor_apply", "optimizers")
    assert software.check_apex().status == "ok"


@pytest.mark.parametrize(
    ("found", "status"),
    [("0.16.1", "ok"), ("0.16.2", "ok"), ("0.16.0", "failed"), ("0.17.0", "failed"), ("0.16.0rc1", "failed")],
)
def test_another_megatron_core_is_found(found: str, status: str, folder: Path) -> None:
    metadata = folder / f"megatron_core-{found}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {found}\n")
    finding = software.check_megatron_core()
    assert (finding.status, finding.detail) == (status, found)
    assert bool(finding.remedy) == (status == "failed")


def test_an_old_torch_is_found(folder: Path) -> None:
    metadata = folder / "torch-2.4.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.1\n")
    (finding,) = software.check_torch()
    assert (finding.status, finding.detail) == ("failed", "2.4.1")


@pytest.mark.parametrize("run_dir", ["/proc/no run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_found(run_dir: str) -> None:
    (finding,) = storage.check_storage(Path(run_dir), 1, 0.0)
    assert finding.status == "failed"
    assert run_dir in finding.detail
    assert "--run_dir" in finding.remedy


def test_a_file_system_mounted_read_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    finding = storage.check_writable(tmp_path)
    assert finding.status == "failed"
    assert "Read-only file system" in finding.detail


def test_a_rename_that_does_not_replace_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda source, target: None)
    assert storage.check_writable(tmp_path).status == "failed"


def test_locks_that_do_not_lock_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.check_lock(tmp_path).status == "ok"
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: None)
    assert storage.check_lock(tmp_path).status == "warning"


def test_a_slow_disk_is_found_and_its_rate_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.check_disk_speed(tmp_path, 2, 0.0).status == "ok"
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.5), real(descriptor)))
    finding = storage.check_disk_speed(tmp_path, 2, 50.0)
    assert finding.status == "warning"
    assert 0 < finding.value < 4.0
    assert "faster file system" in finding.remedy
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "free" in storage.check_disk_speed(tmp_path, 2, 0.0).detail


def test_a_file_servers_clock_that_is_off_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.check_file_clock(tmp_path).status == "ok"
    monkeypatch.setattr(storage.time, "time", lambda: 1000.0)
    assert storage.check_file_clock(tmp_path).status == "warning"


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_found(taken_port: int) -> None:
    finding = network.check_port(taken_port)
    assert finding.status == "failed"
    assert f"port {taken_port} cannot be used" in finding.detail
    assert "--port" in finding.remedy
    assert network.check_port(network.free_port()).status == "ok"


def test_a_host_name_that_does_not_resolve_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert network.check_host_name().status == "failed"


def worker(statement: str) -> list[str]:
    """A process of the all-reduce that does something else."""
    return [sys.executable, "-c", f"import os, signal, sys, time; rank = int(os.environ['RANK']); {statement}"]


@pytest.mark.parametrize(
    ("statement", "detail"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)", "process 1 was killed by SIGKILL"),
        ("sys.exit(3) if rank == 0 else time.sleep(60)", "process 0 ended with status 3"),
        ("time.sleep(60) if rank == 0 else None", "process 0 had not finished after 2 s"),
    ],
)
def test_a_killed_failing_or_hung_peer_is_found_and_nothing_is_left_running(statement: str, detail: str) -> None:
    started = time.monotonic()
    finding = network.check_all_reduce(2.0, worker(statement))
    assert (finding.status, finding.detail) == ("failed", detail)
    assert time.monotonic() - started < 20


def test_a_device_below_its_data_sheet_is_found() -> None:
    sheet = devices.sheet_of("NVIDIA H100 80GB HBM3")
    assert sheet is not None
    slow = devices.judge_rate("GPU 3 matrix rate", 300.0, sheet.tflops, 0.55, "TFLOP/s")
    assert (slow.status, slow.detail) == ("warning", "slow: 30 % of the data sheet, at least 55 % expected")
    assert devices.judge_rate("GPU 3 matrix rate", 700.0, sheet.tflops, 0.55, "TFLOP/s").status == "ok"
    assert devices.judge_rate("GPU 0 matrix rate", 7.0, 0.0, 0.55, "TFLOP/s").status == "ok"
    assert devices.sheet_of("NVIDIA GeForce RTX 4090") is None


@pytest.mark.gpu
def test_devices_are_measured() -> None:
    findings = devices.check_devices()
    assert findings[0].status == "ok"
    assert all(finding.value > 0 for finding in findings if finding.unit)


def test_a_sound_machine_passes_with_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["doctor", "--run_dir", str(tmp_path), "--port", str(network.free_port()), *QUICK]
    assert cli.main([*flags, "--json", "true"]) == 0
    findings = [Finding(**values) for values in json.loads(capsys.readouterr().out)]
    assert count_of(findings, "failed") == 0
    assert {"python", "torch", "megatron-core", "apex", "run folder", "disk speed", "port", "all-reduce"} <= {
        finding.name for finding in findings
    }
    assert not list(tmp_path.iterdir())


def test_failures_end_in_status_1_after_the_table(
    taken_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "check_all_reduce", lambda timeout: Finding("all-reduce", "ok", "two processes"))
    assert cli.main(["doctor", "--run_dir", "/proc/run", "--port", str(taken_port), *QUICK]) == 1
    output = capsys.readouterr()
    assert output.err == "megaprot doctor: error: 2 check(s) failed; the remedies stand beside them.\n"
    assert sum(line.startswith("failed") for line in output.out.splitlines()) == 2


@pytest.mark.parametrize(
    "flags", [["--port", "70000"], ["--disk_mb", "0"], ["--least_share", "2"], ["--timeout_seconds", "-1"]]
)
def test_wrong_numbers_are_status_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_table_shows_nodes_and_remedies() -> None:
    one = Finding("port", "failed", "taken", "give another.", node="a")
    other = Finding("disk speed", "ok", "written", "", 12.0, "MiB/s", "b")
    table = as_table([one, other, Finding("clocks", "ok", "x")])
    assert table.splitlines() == [
        "failed   a: port        taken",
        "                        -> give another.",
        "ok       b: disk speed  written (12 MiB/s)",
        "ok       all: clocks    x",
    ]
