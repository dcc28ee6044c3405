"""What the machine can do: matrix rate at a model's own shapes, copy and file bandwidth, and the floors that follow.

The floor of a training step is its matrix products alone, forward and backward, at the rate the machine reaches on just
these shapes; nothing else is counted. The floor of making rows is one read and one write of each token's bytes.
usage: python benchmarks/bench_ceilings.py [--seconds 2]
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import SHAPES, rate, record

ROW_TOKENS = 4096
ROW_BYTES = 1 + 8 + 8 + 8  # of a token: residue id read; token ids, positions, labels written


def products(hidden: int) -> list[tuple[int, int, int]]:
    """Return (rows, inner, columns) of the matrix products of one layer on a row: forward, for inputs, for weights."""
    sizes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    forward = [(ROW_TOKENS, inner, outer) for inner, outer in sizes]
    of_inputs = [(ROW_TOKENS, outer, inner) for inner, outer in sizes]
    of_weights = [(outer, ROW_TOKENS, inner) for inner, outer in sizes]
    return forward + of_inputs + of_weights


def layer(hidden: int, dtype: torch.dtype) -> tuple[Callable[[], int], int]:
    """Return a function that computes a layer's products once and returns the tokens done; and their operations."""
    shapes = products(hidden)
    pairs = [(torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)) for m, k, n in shapes]
    outputs = [torch.empty(m, n, dtype=dtype) for m, _, n in shapes]

    def once() -> int:
        for (left, right), output in zip(pairs, outputs, strict=True):
            torch.mm(left, right, out=output)
        return ROW_TOKENS

    once()
    return once, sum(2 * m * k * n for m, k, n in shapes)


def copied() -> int:
    """Copy 256 MB between two arrays and return the bytes read and written."""
    _TARGET[:] = _SOURCE
    return 2 * _SOURCE.nbytes


_SOURCE = np.ones(1 << 28, dtype=np.uint8)
_TARGET = np.zeros(1 << 28, dtype=np.uint8)


def main() -> None:
    """Measure, print and record."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--seconds", type=float, default=2.0)
    given = options.parse_args()
    results = []
    for name in ("8m", "35m"):
        num_layers, hidden = SHAPES[name]
        for dtype in (torch.bfloat16, torch.float32):
            once, operations = layer(hidden, dtype)
            layers = rate(once, given.seconds)
            results.append({
                "claim": f"matrix products of a training step, {name} shape, {str(dtype).removeprefix('torch.')}",
                "gflops": round(layers * operations / ROW_TOKENS / 1e9),
                "floor_tokens_per_second": round(layers / num_layers),
            })  # fmt: skip
    bandwidth = rate(copied, given.seconds)
    results.append({
        "claim": "copy bandwidth of one core, bytes read and written", "gb_per_second": round(bandwidth / 1e9, 1),
        "floor_row_tokens_per_second": round(bandwidth / ROW_BYTES),
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes"
        written = rate(lambda: path.write_bytes(_SOURCE.data), given.seconds)
    results.append({"claim": "writing a file through the cache", "gb_per_second": round(written / 1e9, 1)})
    record("ceilings", [{"threads": torch.get_num_threads()}, *results], ["torch", "numpy"])


if __name__ == "__main__":
    main()
