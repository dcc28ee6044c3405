"""One doctor a node under ``srun``: reports meet in the run folder, odd, slow and silent nodes are named."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megaprot.common.files import write_json_atomically
from megaprot.tools.diagnosis.finding import Finding

SAME_EVERYWHERE = ("python", "torch", "cuda", "nccl", "megatron-core", "megaprot", "apex", "transformer-engine", "GPUs")
"""Checks whose detail must be the same on all nodes."""
_CLOCK_SECONDS = 1.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class NodePlace:
    """Where this process stands among the nodes of a Slurm step.

    Attributes:
        node: Number of this node, from 0.
        num_nodes: Nodes of the step.
        local: Number of this task on its node; the first alone runs checks.
        step: Name of the job step, to tell reports of different runs apart.
        host: Name of this node.
    """

    node: int
    num_nodes: int
    local: int
    step: str
    host: str


def place_of(environment: Mapping[str, str]) -> NodePlace:
    """Return this process's place from Slurm's variables; alone on one node without them."""
    step = f"{environment.get('SLURM_JOB_ID', 'alone')}-{environment.get('SLURM_STEP_ID', '0')}"
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "SLURM_PROCID" not in environment:
        return NodePlace(0, 1, 0, step, host)
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
    return NodePlace(
        int(environment.get("SLURM_NODEID", "0")), int(nodes), int(environment.get("SLURM_LOCALID", "0")), step, host
    )


def report_folder(run_dir: Path, place: NodePlace) -> Path:
    """Return the folder where the nodes of this step leave their reports."""
    return run_dir / f".doctor-{place.step}"


def write_report(folder: Path, place: NodePlace, findings: Sequence[Finding]) -> None:
    """Leave a node's findings, and its clock at that moment, for the first node to read."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"host": place.host, "findings": [asdict(finding) for finding in findings]}
    write_json_atomically(folder / f"node{place.node}.json", values)


@dataclass(frozen=True)
class Report:
    """What one node found, and its name."""

    host: str
    findings: list[Finding]


def read_reports(folder: Path, num_nodes: int, timeout_seconds: float) -> tuple[dict[int, Report], list[int]]:
    """Wait for the reports of all nodes; returns them by node and the numbers of the nodes that left none."""
    deadline = time.monotonic() + timeout_seconds
    paths = {node: folder / f"node{node}.json" for node in range(num_nodes)}
    while not all(path.exists() for path in paths.values()) and time.monotonic() < deadline:
        os.listdir(folder)  # lets network file systems look again
        time.sleep(_POLL_SECONDS)
    found: dict[int, Report] = {}
    for node, path in paths.items():
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            found[node] = Report(values["host"], [Finding(**finding) for finding in values["findings"]])
    return found, [node for node in paths if node not in found]


def odd_nodes(reports: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return a failure for each node whose versions or GPUs are not what most nodes have.

    Args:
        reports: Findings by host.
    """
    found = []
    for name in SAME_EVERYWHERE:
        details = {host: one.detail for host, many in reports.items() for one in many if one.name == name}
        if len(set(details.values())) < 2:
            continue
        usual, _ = Counter(details.values()).most_common(1)[0]
        for host, detail in details.items():
            if detail != usual:
                others = next(other for other, seen in details.items() if seen == usual)
                remedy = f"give all nodes one environment: {others} has {usual}."
                odd = f"{host} has {detail}, others {usual}"
                found.append(Finding(f"same {name}", "failed", odd, remedy, node=host))
    return found


def slow_nodes(reports: Mapping[str, Sequence[Finding]], least_share: float) -> list[Finding]:
    """Return a warning for each rate of a node that is less than ``least_share`` of the nodes' median."""
    rates: dict[str, dict[str, float]] = {}
    for host, many in reports.items():
        for one in many:
            if one.unit.endswith("/s"):
                rates.setdefault(one.name, {})[host] = one.value
    found = []
    for name, by_host in rates.items():
        usual = statistics.median(by_host.values())
        for host, value in by_host.items():
            if len(by_host) > 1 and value < least_share * usual:
                detail = f"{host} reaches {value:.4g}, the median is {usual:.4g}"
                remedy = f"leave {host} out (sbatch --exclude={host}) and have it looked at."
                found.append(Finding(f"slow {name}", "warning", detail, remedy, node=host))
    return found


def silent_nodes(missing: Sequence[int], timeout_seconds: float) -> list[Finding]:
    """Return a failure for each node that left no report: its process died, or the folder is not shared."""
    remedy = "look at that node (sinfo -R, its log) and see that --run_dir is on a file system all nodes share."
    detail = f"no report within {timeout_seconds:.0f} s: killed, lost, or its folder is another"
    return [Finding("report", "failed", detail, remedy, node=f"node {node}") for node in missing]


def clock_skew(clocks: Mapping[str, float]) -> Finding:
    """Return whether the clocks of nodes agree.

    Args:
        clocks: Seconds that each host's clock showed at one moment.
    """
    skew = max(clocks.values()) - min(clocks.values())
    if skew <= _CLOCK_SECONDS:
        return Finding("clocks", "ok", "the nodes' clocks agree", "", skew, "s")
    usual = statistics.median(clocks.values())
    odd = max(clocks, key=lambda host: abs(clocks[host] - usual))
    remedy = "let chrony or ntpd set the clocks; logs and file times mislead otherwise."
    return Finding("clocks", "warning", f"the clock of {odd} is off", remedy, skew, "s", odd)


def on_node(findings: Sequence[Finding], host: str) -> list[Finding]:
    """Return findings with their host's name."""
    return [replace(finding, node=host) for finding in findings]
