"""Check a machine, or under srun every node of a job, before a run is started on it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megaprot.common.errors import InputError, RunError
from megaprot.common.quiet import quiet


@dataclass
class DoctorConfig:
    """What ``megaprot doctor`` can be told.

    Attributes:
        run_dir: Folder to try, on the file system where runs will be; every node must see it.
        port: Rendezvous port to try; 0 tries none.
        disk_mb: MiB written to measure the disk.
        least_disk_mb_per_second: A slower disk is a warning.
        least_share: A node whose rates are below this share of the nodes' median is called slow.
        timeout_seconds: Longest wait for another process or node.
        json: Print JSON.
    """

    run_dir: str = "runs"
    port: int = 29500
    disk_mb: int = 64
    least_disk_mb_per_second: float = 50.0
    least_share: float = 0.8
    timeout_seconds: float = 120.0
    json: bool = False


CONFIG = DoctorConfig


def _check_numbers(config: DoctorConfig) -> None:
    if not 0 <= config.port < 65536:
        raise InputError(f"--port is {config.port}; give a port number below 65536, or 0 to try none.")
    for name in ("disk_mb", "timeout_seconds"):
        if getattr(config, name) <= 0:
            raise InputError(f"--{name} is {getattr(config, name)}; give a number above 0.")
    if not 0 <= config.least_share <= 1 or config.least_disk_mb_per_second < 0:
        raise InputError("--least_share must be from 0 to 1 and --least_disk_mb_per_second 0 or more; correct them.")


def run(config: DoctorConfig) -> None:
    """Check this node, gather what the other nodes of the job step found, and print a table or JSON.

    Raises:
        InputError: A number is none.
        RunError: A check failed (exit status 1); warnings alone are exit status 0.
    """
    quiet("torch")
    from megaprot.tools.diagnosis import devices, meeting, network, nodes, software, storage
    from megaprot.tools.diagnosis.finding import as_table, count_of

    _check_numbers(config)
    place, folder = nodes.place_of(os.environ), Path(config.run_dir)
    if place.local:  # one process a node is enough
        return
    findings = [*software.check_software(), *devices.check_devices()]
    findings += storage.check_storage(folder, config.disk_mb, config.least_disk_mb_per_second)
    findings.append(network.check_host_name())
    if config.port and place.node == 0:
        findings.append(network.check_port(config.port))
    findings.append(network.check_all_reduce(config.timeout_seconds))
    if place.num_nodes > 1:
        rules = meeting.Meeting(nodes.report_folder(folder, place), place, config.timeout_seconds, config.least_share)
        try:
            if place.node:
                meeting.attend(rules, findings)
                return
            findings = meeting.preside(rules, findings)
        except OSError as error:
            broken = f"{place.host}: no report could be left in {folder} ({error.strerror}); name a shared --run_dir."
            raise RunError(broken) from error
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if config.json else as_table(findings))
    num_failed = count_of(findings, "failed")
    if num_failed:
        raise RunError(f"{num_failed} check(s) failed; the remedies stand beside them.")
