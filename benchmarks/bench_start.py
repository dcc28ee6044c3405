"""How soon `megaprot pretrain` takes its first step on a corpus of Pfam's size: 34,353,433 sequences.

The corpus is made here: real index and manifest, residues all alike in a sparse file, so that nothing but
reading from a disk is missing. The first start makes the packing plan of the epoch, the second finds it filed.
usage: python benchmarks/bench_start.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from corpora import ESM, PFAM_SEQUENCES, like_pfam
from measure import record

from megaprot.common.files import write_json_atomically
from megaprot.pretrain import corpus


def make_corpus(prefix: Path, num_sequences: int) -> None:
    """Write a corpus of log-normal lengths of mean 158 whose ``.bin`` is a hole of the right size."""
    lengths = like_pfam(num_sequences)
    num_residues = int(lengths.sum(dtype=np.int64))
    with open(corpus.corpus_file(prefix, ".bin"), "wb") as stream:
        stream.truncate(num_residues)
    manifest: dict[str, Any] = {
        "format": corpus.FORMAT,
        "format_version": corpus.FORMAT_VERSION,
        "vocabulary": ESM.to_dict(),
        "num_sequences": num_sequences,
        "num_residues": num_residues,
        "families": {},
        "files": {
            ".bin": {"num_bytes": num_residues, "sha256": f"of {num_sequences} made up"},
            ".idx": corpus._write_index(corpus.corpus_file(prefix, ".idx"), lengths, np.dtype("<u1")),
        },
    }
    manifest["digest"] = corpus.manifest_digest(manifest)
    write_json_atomically(corpus.corpus_file(prefix, ".json"), manifest)


def first_step(folder: Path, run: str) -> dict[str, float]:
    """Start a run of one step; return seconds to its first line and to its first step, and its peak memory in GB."""
    command = [
        *(sys.executable, "-m", "megaprot.pretrain", "--config", "esm2_8m", "--data.path", str(folder)),
        *("--data.verify", "false", "--data.plan_folder", str(folder / "plans"), "--run.dir", str(folder / run)),
        *("--train.num_steps", "1", "--train.global_batch_rows", "1", "--optim.warmup_steps", "0"),
        *("--train.precision", "fp32", "--train.eval_rows", "1", "--train.log_interval", "1"),
        *("--data.row_tokens", "2048", "--data.max_sequence_length", "1024"),
    ]
    start, found = time.perf_counter(), {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        found.setdefault("first_line_s", round(time.perf_counter() - start, 1))
        if line.startswith("step "):
            found.setdefault("first_step_s", round(time.perf_counter() - start, 1))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run ended with status {status}")
    return found | {"peak_memory_gb": round(usage.ru_maxrss / 1e6, 2)}


def main() -> None:
    """Make the corpus, start twice, print and record."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_corpus(folder / "train", PFAM_SEQUENCES)
        make_corpus(folder / "valid", 1000)
        claim = f"megaprot pretrain, ESM-2 8M shape, on {PFAM_SEQUENCES:,} sequences: seconds from the command on"
        result = {"claim": claim, "first_start": first_step(folder, "a"), "second_start": first_step(folder, "b")}
        record("start", [result], ["megatron-core", "numpy", "numba", "torch"])


if __name__ == "__main__":
    main()
