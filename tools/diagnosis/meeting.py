"""How the doctors of several nodes meet: reports to the first node, one all-reduce over all that reported."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprot.common.files import write_json_atomically
from megaprot.tools.diagnosis.finding import Finding
from megaprot.tools.diagnosis.network import WORKER, await_workers, free_port, start_worker
from megaprot.tools.diagnosis.nodes import (
    NodePlace,
    clock_skew,
    odd_nodes,
    on_node,
    read_reports,
    silent_nodes,
    slow_nodes,
    write_report,
)

_WORD_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """The rules of a meeting.

    Attributes:
        folder: Where notes are left; every node must see it.
        place: This node's.
        timeout_seconds: Longest wait for reports, and for the all-reduce.
        least_share: A node's rates may be this share of the median before it is called slow.
        worker: Program of one process of the all-reduce.
    """

    folder: Path
    place: NodePlace
    timeout_seconds: float
    least_share: float
    worker: Sequence[str] = WORKER


def _await_note(path: Path, timeout_seconds: float) -> dict[str, Any] | None:
    """Return the note at ``path`` once it is there, None where it does not come."""
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return None
        if path.parent.is_dir():
            os.listdir(path.parent)  # lets network file systems look again
        time.sleep(0.05)
    note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return note


def attend(meeting: Meeting, findings: Sequence[Finding]) -> None:
    """Be one of the other nodes: leave the report, take part in the all-reduce, leave word of it."""
    place = meeting.place
    write_report(meeting.folder, place, findings)
    call = _await_note(meeting.folder / "call.json", 2 * meeting.timeout_seconds)
    if call is None or place.node not in call["nodes"]:
        return
    rank = call["nodes"].index(place.node)
    process = start_worker(meeting.worker, rank, len(call["nodes"]), call["host"], call["port"], 0)
    problem, _ = await_workers([process], meeting.timeout_seconds)
    write_json_atomically(meeting.folder / f"word{place.node}.json", {"problem": problem})


def _reduce_over(meeting: Meeting, hosts: dict[int, str]) -> list[Finding]:
    """Run the all-reduce over the nodes of ``hosts`` from the first of them; names those it failed on."""
    nodes, host, port = sorted(hosts), socket.gethostname(), free_port()
    write_json_atomically(meeting.folder / "call.json", {"nodes": nodes, "host": host, "port": port})
    process = start_worker(meeting.worker, 0, len(nodes), host, port, 0)
    problem, measured = await_workers([process], meeting.timeout_seconds)
    words = {node: _await_note(meeting.folder / f"word{node}.json", _WORD_SECONDS) for node in nodes[1:]}
    silent = [hosts[node] for node, word in words.items() if word is None]
    troubled = [f"{hosts[node]} ({word['problem']})" for node, word in words.items() if word and word["problem"]]
    remedy = "see that no firewall stands between the nodes; NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME."
    if silent:
        detail = f"no word from {', '.join(silent)}: its process was killed or the node is lost"
        look = "look at that node (sinfo -R, its log)."
        return [Finding("all-reduce of nodes", "failed", detail, look, node=silent[0])]
    if problem or troubled:
        detail = "; ".join([*([problem.replace("process 0", hosts[0])] if problem else []), *troubled])
        return [Finding("all-reduce of nodes", "failed", detail, remedy)]
    rate = measured["gb_per_second"]
    clocks = dict(zip((hosts[node] for node in nodes), measured["clocks"], strict=True))
    return [Finding("all-reduce of nodes", "ok", f"{len(nodes)} nodes", "", rate, "GB/s"), clock_skew(clocks)]


def preside(meeting: Meeting, findings: Sequence[Finding]) -> list[Finding]:
    """Be the first node: gather all reports, compare them, run the all-reduce; returns all findings, hosts named."""
    place = meeting.place
    write_report(meeting.folder, place, findings)
    reports, missing = read_reports(meeting.folder, place.num_nodes, meeting.timeout_seconds)
    hosts = {node: report.host for node, report in reports.items()}
    by_host = {report.host: report.findings for report in reports.values()}
    found = [finding for host, many in by_host.items() for finding in on_node(many, host)]
    found += [*silent_nodes(missing, meeting.timeout_seconds), *odd_nodes(by_host)]
    found += slow_nodes(by_host, meeting.least_share)
    if len(hosts) > 1:
        found += _reduce_over(meeting, hosts)
    shutil.rmtree(meeting.folder, ignore_errors=True)
    return found
