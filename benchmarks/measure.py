"""What all benchmarks share: rounds in turn, medians and ratios, and a record with machine, versions and commit."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CUT = ROOT / "examples" / "pfam" / "Pfam-A.cut.fasta.gz"
SHAPES = {"8m": (6, 320), "35m": (12, 480), "150m": (30, 640)}  # of ESM-2: layers, hidden size; 20 heads


def rate(step: Callable[[], int], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return what ``step`` counts a second, called for at least ``seconds``."""
    start, counted = clock(), 0
    while clock() - start < seconds:
        counted += step()
    return counted / (clock() - start)


def rates_in_turn(
    contenders: dict[str, Callable[[], int]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the rates of each contender, who take turns so that a busy moment of the machine meets all of them.

    ``clock`` gives seconds; ``time.process_time`` those of the process alone, for a machine with other work on it.
    """
    for step in contenders.values():
        step()  # compile and warm up
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            rates[name].append(rate(step, seconds, clock))
    return rates


@contextmanager
def apart(make: Callable[..., Callable[[], int]], *arguments: Any, environment: Mapping[str, str]) -> Iterator[Any]:
    """Give a contender a process of its own, so that none meets what another has set or left behind.

    Args:
        make: Function of a module, called there with ``arguments``; returns the contender.
        arguments: What can be sent to a process.
        environment: Variables that are set before it imports anything.

    Yields:
        A function that calls the contender there and returns what it counts.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    before = dict(os.environ)
    os.environ.update(environment)
    process.start()
    os.environ.clear()
    os.environ.update(before)
    there.close()

    def call() -> int:
        here.send(None)
        counted: int = here.recv()
        return counted

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(connection: Any, make: Callable[..., Callable[[], int]], arguments: tuple[Any, ...]) -> None:
    step = make(*arguments)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(step())


def compared(claim: str, unit: str, rates: dict[str, list[float]], ours: str = "megaprot") -> dict[str, Any]:
    """Return medians, rounds and ratios of ours to each peer, whose name does not begin with ``megaprot``."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    peers = [name for name in rates if not name.startswith("megaprot")]
    return {
        "claim": claim,
        unit: {name: round(value) for name, value in medians.items()},
        "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
        "ratio": {name: round(medians[ours] / medians[name], 2) for name in peers},
        "ratio_by_round": {
            name: [round(mine / other, 2) for mine, other in zip(rates[ours], rates[name], strict=True)]
            for name in peers
        },
    }


def peak_bytes() -> int:
    """Return the peak memory of this process; what getrusage says includes that of the program it was started from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def record(name: str, results: list[dict[str, Any]], packages: list[str]) -> None:
    """Print results and write them as ``benchmarks/results/<name>.json`` with all that is needed to repeat them."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    content = {
        "results": results,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor()}",
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(content, indent=2)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def processor() -> str:
    """Return the processor's name as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
