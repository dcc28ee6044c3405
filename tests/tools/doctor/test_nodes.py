"""Doctors of several nodes: odd, slow, silent and killed ones are named."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megaprot.tools.diagnosis import meeting
from megaprot.tools.diagnosis.finding import Finding
from megaprot.tools.diagnosis.meeting import Meeting, attend, preside
from megaprot.tools.diagnosis.nodes import (
    NodePlace,
    clock_skew,
    odd_nodes,
    place_of,
    read_reports,
    slow_nodes,
    write_report,
)
from tests.pretrain.tiny import ROOT

WELL = [Finding("torch", "ok", "2.13.0"), Finding("disk speed", "ok", "written", "", 200.0, "MiB/s")]
FALSE_WORKER = [
    sys.executable,
    "-c",
    "import json; print(json.dumps({'gb_per_second': 1.5, 'clocks': [100.0, 100.2, 100.1]}))",
]


def place(node: int, num_nodes: int = 3) -> NodePlace:
    """A node of a step."""
    return NodePlace(node, num_nodes, 0, "1-0", f"host{node}")


def rules(folder: Path, node: int, timeout: float = 20.0, num_nodes: int = 3) -> Meeting:
    """A meeting whose all-reduce is only played."""
    return Meeting(folder, place(node, num_nodes), timeout, 0.8, FALSE_WORKER)


def test_slurms_variables_give_the_place() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NODEID": "2", "SLURM_NNODES": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    assert place_of(slurm | {"SLURMD_NODENAME": "n2"}) == NodePlace(2, 3, 1, "77-0", "n2")
    assert place_of(slurm | {"SLURM_STEP_NUM_NODES": "2"}).num_nodes == 2
    alone = place_of({"SLURM_JOB_ID": "77", "SLURM_NNODES": "3"})  # inside a batch script, without srun
    assert (alone.node, alone.num_nodes) == (0, 1)


def test_the_node_with_another_version_is_named() -> None:
    reports = {f"host{node}": [Finding("torch", "ok", "2.9.0" if node == 1 else "2.13.0")] for node in range(3)}
    (finding,) = odd_nodes(reports)
    assert (finding.name, finding.status, finding.node) == ("same torch", "failed", "host1")
    assert finding.detail == "host1 has 2.9.0, others 2.13.0"
    assert not odd_nodes(dict.fromkeys(("a", "b"), WELL))


def test_the_slow_node_is_named_for_each_rate() -> None:
    rates = {"host0": 99.0, "host1": 30.0, "host2": 101.0}
    reports = {host: [Finding("disk speed", "ok", "", "", rate, "MiB/s")] for host, rate in rates.items()}
    (finding,) = slow_nodes(reports, 0.8)
    assert (finding.status, finding.node) == ("warning", "host1")
    assert "--exclude=host1" in finding.remedy
    assert not slow_nodes({"alone": WELL}, 0.8)


def test_the_clock_that_is_off_is_named() -> None:
    assert clock_skew({"a": 5.0, "b": 5.4, "c": 4.9}).status == "ok"
    finding = clock_skew({"a": 5.0, "b": 65.0, "c": 5.1})
    assert (finding.status, finding.node, finding.value) == ("warning", "b", 60.0)


def test_nodes_meet_and_every_finding_has_its_host(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    others = [threading.Thread(target=attend, args=(rules(folder, node), WELL)) for node in (1, 2)]
    for thread in others:
        thread.start()
    found = preside(rules(folder, 0), WELL)
    for thread in others:
        thread.join()
    assert sorted({finding.node for finding in found}) == ["", "host0", "host1", "host2"]
    assert [finding.name for finding in found if not finding.node] == ["all-reduce of nodes", "clocks"]
    assert all(finding.status == "ok" for finding in found)
    assert not folder.exists()


def test_a_node_that_sends_no_report_is_named(tmp_path: Path) -> None:
    found = preside(rules(tmp_path / "notes", 0, timeout=0.5, num_nodes=2), WELL)
    (silent,) = [finding for finding in found if finding.status == "failed"]
    assert (silent.name, silent.node) == ("report", "node 1")
    assert "--run_dir" in silent.remedy


def test_a_node_killed_after_its_report_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_WORD_SECONDS", 0.5)
    write_report(tmp_path / "notes", place(1), WELL)
    write_report(tmp_path / "notes", place(2), WELL)
    (tmp_path / "notes" / "word2.json").write_text('{"problem": ""}')
    found = preside(rules(tmp_path / "notes", 0), WELL)
    (lost,) = [finding for finding in found if finding.status == "failed"]
    assert (lost.name, lost.node) == ("all-reduce of nodes", "host1")
    assert "no word from host1" in lost.detail


def test_a_node_whose_process_of_the_all_reduce_dies_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    dying = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    other = Meeting(folder, place(1, 2), 20.0, 0.8, dying)
    thread = threading.Thread(target=attend, args=(other, WELL))
    thread.start()
    found = preside(rules(folder, 0, num_nodes=2), WELL)
    thread.join()
    (failed,) = [finding for finding in found if finding.status == "failed"]
    assert "host1 (process 0 was killed by SIGKILL)" in failed.detail


def test_a_node_that_is_not_called_goes_home(tmp_path: Path) -> None:
    attend(rules(tmp_path / "notes", 1, timeout=0.2), WELL)
    reports, missing = read_reports(tmp_path / "notes", 3, 0.1)
    assert (list(reports), missing) == ([1], [0, 2])
    assert reports[1].findings == WELL


@pytest.mark.slow
def test_two_doctors_under_slurm_find_the_node_with_another_version(tmp_path: Path) -> None:
    """Real processes with Slurm's variables, a real all-reduce between them; one sees another megatron-core."""
    metadata = tmp_path / "other" / "megatron_core-0.15.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    run_dir = tmp_path / "runs"
    flags = ["doctor", "--run_dir", str(run_dir), "--disk_mb", "1", "--port", "0", "--timeout_seconds", "90", "--json"]
    doctors = []
    for node in range(2):
        slurm = {"SLURM_JOB_ID": "9", "SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "SLURM_NNODES": "2"}
        slurm |= {"SLURM_LOCALID": "0", "SLURMD_NODENAME": f"n{node}", "OMP_NUM_THREADS": "1"}
        if node:
            slurm["PYTHONPATH"] = str(tmp_path / "other")
        command = [sys.executable, "-m", "megaprot.tools.cli", *flags]
        doctors.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        outputs = [doctor.communicate(timeout=200) for doctor in doctors]
    finally:
        for doctor in doctors:
            doctor.kill()
    assert [doctor.returncode for doctor in doctors] == [1, 0], outputs[0][1].decode()
    assert not outputs[1][0]
    found = [Finding(**values) for values in json.loads(outputs[0][0])]
    odd = [finding.node for finding in found if finding.name == "same megatron-core"]
    assert len(odd) == 1
    assert [finding.status for finding in found if finding.name == "all-reduce of nodes"] == ["ok"]
    failed = {(finding.name, finding.node) for finding in found if finding.status == "failed"}
    assert failed == {("megatron-core", "n1"), ("same megatron-core", odd[0])}
    assert not list(run_dir.iterdir())
