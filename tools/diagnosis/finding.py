"""What a check found, and findings as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one node.

    Attributes:
        name: The check.
        status: ``failed`` stops a run, ``warning`` slows it or may, ``skipped`` could not be checked here.
        detail: What was seen; of versions the version alone, so that nodes compare.
        remedy: What to do; empty where nothing is wrong.
        value: The measured number, 0 where there is none.
        unit: Its unit.
        node: Host it was found on.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    value: float = 0.0
    unit: str = ""
    node: str = ""


def count_of(findings: Sequence[Finding], status: Status) -> int:
    """Return how many findings have ``status``."""
    return sum(finding.status == status for finding in findings)


def as_table(findings: Sequence[Finding]) -> str:
    """Return findings as aligned lines, with the remedy below each that has one."""
    nodes = {finding.node for finding in findings}
    names = [f"{finding.node or 'all'}: {finding.name}" if len(nodes) > 1 else finding.name for finding in findings]
    width = max(map(len, names), default=0)
    lines = []
    for name, finding in zip(names, findings, strict=True):
        measured = f" ({finding.value:,.4g} {finding.unit})" if finding.unit else ""
        lines.append(f"{finding.status:<8} {name:<{width}}  {finding.detail}{measured}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)
