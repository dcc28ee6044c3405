"""Convert a checkpoint of a 650M shape to the Hugging Face format and back, beside ``cp`` of the same bytes.

``python benchmarks/bench_conversion.py [--recipe esm2_650m] [--folder DIR]``. Records the rates in bytes of model
weights a second, each as a share of ``cp``'s in the same run (files synced to disk by both), and the peak memory of a
process that converts, above that of one which has only imported what it needs. A Megatron checkpoint comes with a
SHA-256 of every byte, so ``cp`` followed by ``sha256sum`` is its second peer.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import record

from megaprot.common.command_line import parse_config
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.__main__ import RECIPES
from megaprot.pretrain.config import ModelConfig, PretrainConfig
from megaprot.tools.conversion.megatron_writer import write_megatron
from megaprot.tools.conversion.names import our_shapes
from megaprot.tools.conversion.source_model import SourceModel
from megaprot.tools.conversion.tensor_source import DerivedTensors, TensorInfo

_CONVERT = """
import sys, time
from megaprot.common.quiet import quiet
quiet("megatron"), quiet("torch.distributed")
from megaprot.tools.conversion.conversion import convert
from megaprot.tools.convert import ConvertConfig
from measure import peak_bytes
before = peak_bytes()
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
convert(ConvertConfig(*sys.argv[1:]))
print(time.perf_counter() - started, before, peak_bytes())
"""


def random_model(model: ModelConfig) -> SourceModel:
    """A model of this shape, its tensors drawn when they are asked for."""
    vocabulary = get_vocabulary("esm")
    shapes = our_shapes(model, vocabulary, 1024)
    infos = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
    return SourceModel(DerivedTensors(infos, lambda name: torch.randn(shapes[name])), model, 1024, vocabulary)


def converted(given: Path, made: Path, to: str) -> tuple[float, float]:
    """Seconds of a conversion in a process of its own, imports aside, and its peak memory above them in bytes."""
    command = [sys.executable, "-c", _CONVERT, str(given.absolute()), str(made.absolute()), to]
    pipe, here = subprocess.PIPE, Path(__file__).parent  # where it finds measure.py
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=here) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()  # it has imported what it needs
        warm(made.parent, sum(path.stat().st_size for path in given.rglob("*") if path.is_file()))
        printed, _ = process.communicate("go\n")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds, before, peak = map(float, printed.splitlines()[-1].split())
    return seconds, peak - before


def warm(folder: Path, num_bytes: int) -> None:
    """Fill and free the page cache that what is timed next will use: memory that a virtual machine has not is slow.

    Only what follows at once is timed with it: a host takes free memory back within seconds.
    """
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={folder / 'warm'}", "bs=1M", f"count={num_bytes >> 20}"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    subprocess.run(["sync", str(folder / "warm")], check=True)
    (folder / "warm").unlink()


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds that ``cp`` takes with the bytes synced to disk, as a conversion does before it shows its folder.

    The second number has those of ``sha256sum`` of the copy added.
    """
    warm(target.parent, source.stat().st_size)
    started = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - started
    subprocess.run(["sha256sum", str(target)], check=True, stdout=subprocess.DEVNULL)
    with_checksum = time.perf_counter() - started
    target.unlink()
    return seconds, with_checksum


def _add_copy(seconds: dict[str, list[float]], source: Path, target: Path) -> None:
    for kind, took in zip(("cp", "cp_and_sha256sum"), copied(source, target), strict=True):
        seconds[kind].append(took)


def measure(recipe: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Convert to and fro ``repeats`` times; medians are reported."""
    config = parse_config(PretrainConfig, ["--config", recipe], program="bench", description="", recipes=RECIPES)
    source = random_model(config.model)
    (folder / "step").mkdir()
    write_megatron(source, folder / "step", torch.float32)
    num_bytes = sum(info.num_bytes for info in source.tensors.infos.values())
    weights = folder / "step" / "weights" / "__0_0.distcp"
    seconds: dict[str, list[float]] = {"cp": [], "cp_and_sha256sum": [], "to_hf": [], "to_megatron": []}
    peaks: dict[str, float] = {}
    for _ in range(repeats):
        _add_copy(seconds, weights, folder / "copy")
        for kind, given, made, to in (("to_hf", "step", "hf", "hf"), ("to_megatron", "hf", "back", "megatron")):
            took, peak = converted(folder / given, folder / made, to)
            seconds[kind].append(took)
            peaks[kind] = max(peak, peaks.get(kind, 0.0))
        _add_copy(seconds, weights, folder / "copy")
        for made in ("hf", "back"):
            shutil.rmtree(folder / made)
    middle = {kind: statistics.median(times) for kind, times in seconds.items()}
    largest = max(info.num_bytes for info in source.tensors.infos.values())
    return {
        "claim": f"conversion of the {recipe} shape, fp32: at least half of cp's rate",
        "bytes_of_weights": num_bytes,
        "bytes_of_largest_tensor": largest,
        "bytes_per_second": {kind: round(num_bytes / time) for kind, time in middle.items()},
        "share_of_cp": {kind: round(middle["cp"] / middle[kind], 3) for kind in ("to_hf", "to_megatron")},
        "to_megatron_as_share_of_cp_and_sha256sum": round(middle["cp_and_sha256sum"] / middle["to_megatron"], 3),
        "seconds": {kind: [round(time, 3) for time in times] for kind, times in seconds.items()},
        "peak_bytes_above_imports": {kind: round(peak) for kind, peak in peaks.items()},
        "peak_is_within_largest_tensor_plus_1_gb": all(peak <= largest + 1e9 for peak in peaks.values()),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="esm2_650m")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints lie meanwhile")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options.recipe, Path(folder), options.repeats)
    record("conversion", [found], ["torch", "isal"])


if __name__ == "__main__":
    main()
