"""FASTA to an indexed corpus: sequences a second of the whole command on one core, against a megatron-core script.

The input is the shipped cut over and over, as text and gzip-compressed. The peer is what a user of megatron-core
writes: a loop over lines, a table lookup, ``IndexedDatasetBuilder.add_document`` and ``finalize``. Ours also checks
letters, hashes, divides into splits and writes a manifest. Both are fresh processes, imports included.
usage: python benchmarks/bench_preprocess.py [--rounds 3] [--sequences 300000]
"""

import argparse
import gzip
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import CUT, compared, record

PEER = """
import sys, numpy as np, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
table = np.zeros(256, dtype=np.uint8)
table[np.frombuffer(b"LAGVSERTIDPKQNFYMHWCXBUZO", dtype=np.uint8)] = np.arange(4, 29)
builder = IndexedDatasetBuilder(sys.argv[2] + ".bin", dtype=np.uint8)
def add(lines):
    if lines:
        ids = table[np.frombuffer("".join(lines).encode(), dtype=np.uint8)]
        builder.add_document(torch.from_numpy(ids), [len(ids)])
lines = []
for line in open(sys.argv[1]):
    if line.startswith(">"):
        add(lines)
        lines = []
    else:
        lines.append(line.rstrip())
add(lines)
builder.finalize(sys.argv[2] + ".idx")
"""


def write_input(folder: Path, num_sequences: int) -> tuple[Path, Path, int]:
    """Write the cut's records again and again, at least ``num_sequences``; return text, gzip file and their number."""
    content = gzip.decompress(CUT.read_bytes())
    times = -(-num_sequences // content.count(b">"))
    text, packed = folder / "domains.fasta", folder / "domains.fasta.gz"
    with open(text, "wb") as plain, gzip.open(packed, "wb", compresslevel=6) as compressed:
        for _ in range(times):
            plain.write(content)
            compressed.write(content)
    return text, packed, times * content.count(b">")


def run(command: list[str], output: Path) -> tuple[float, float]:
    """Return seconds and peak memory in MB of a process; what it wrote is removed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[:4]} ended with status {status}")
    if output.is_dir():
        shutil.rmtree(output)
    for path in output.parent.glob(output.name + ".*"):
        path.unlink()
    return seconds, usage.ru_maxrss / 1000


def main() -> None:
    """Measure in turn, print and record."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--sequences", type=int, default=300_000)
    given = options.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, packed, num_sequences = write_input(folder, given.sequences)
        output = folder / "output"
        ours = [sys.executable, "-m", "megaprot.tools.cli", "preprocess", "--output", str(output), "--input"]
        commands = {
            "megatron-core": [sys.executable, "-W", "ignore", "-c", PEER, str(text), str(output)],
            "megaprot": [*ours, str(text)],
            "megaprot, gzip": [*ours, str(packed)],
            "megaprot, deduplicating": [*ours, str(text), "--deduplicate", "true"],
        }
        run(commands["megaprot"], output)  # compiles
        rates: dict[str, list[float]] = {name: [] for name in commands}
        memory: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(given.rounds):
            for name, command in commands.items():
                seconds, megabytes = run(command, output)
                rates[name].append(num_sequences / seconds)
                memory[name].append(megabytes)
    claim = f"FASTA to corpus, {num_sequences:,} Pfam domains, whole command on one core"
    result = compared(claim, "sequences_per_second", rates)
    peaks = {name: round(statistics.median(values)) for name, values in memory.items()}
    record("preprocess", [result | {"peak_memory_mb": peaks}], ["megatron-core", "numpy", "numba", "isal"])


if __name__ == "__main__":
    main()
