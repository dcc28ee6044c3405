"""Figures of GPUs and their networks, from data sheets; any of them can be replaced by the user's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megaprot.common.errors import InputError

GIB = 1024.0**3


@dataclass(frozen=True)
class Gpu:
    """One GPU, its links and its place in a machine. Bandwidths are in one direction.

    Attributes:
        memory_gb: Memory that programs can use, in GiB.
        tflops: Dense bf16 matrix rate of the data sheet, TFLOP/s.
        memory_gb_per_second: Memory bandwidth, 1e9 bytes/s.
        link_gb_per_second: Links between the GPUs of a machine (NVLink), 1e9 bytes/s and GPU.
        network_gb_per_second: Network between machines, 1e9 bytes/s and GPU.
        gpus_per_node: GPUs of a machine.
        matrix_share: Share of ``tflops`` that large matrix products reach; fitted to published runs, see
            ``published.py``.
    """

    memory_gb: float
    tflops: float
    memory_gb_per_second: float
    link_gb_per_second: float
    network_gb_per_second: float
    gpus_per_node: float
    matrix_share: float

    @property
    def memory_bytes(self) -> float:
        """Usable memory in bytes."""
        return self.memory_gb * GIB


_AMPERE, _HOPPER, _BLACKWELL = 0.866, 0.614, 0.593

GPUS = {
    "a100-40": Gpu(39.4, 312.0, 1555.0, 300.0, 25.0, 8, _AMPERE),
    "a100-80": Gpu(79.2, 312.0, 2039.0, 300.0, 25.0, 8, _AMPERE),
    "h100": Gpu(79.1, 989.0, 3350.0, 450.0, 50.0, 8, _HOPPER),
    "h200": Gpu(139.8, 989.0, 4800.0, 450.0, 50.0, 8, _HOPPER),
    "b200": Gpu(178.3, 2250.0, 8000.0, 900.0, 50.0, 8, _BLACKWELL),
    "b300": Gpu(267.0, 2250.0, 8000.0, 900.0, 100.0, 8, _BLACKWELL),
}
"""SXM boards in machines of eight, with one 200 (A100), 400 or 800 (B300) Gb/s network port a GPU."""


@dataclass
class GpuFigures:
    """Figures in place of the data sheet's; 0 keeps that.

    Attributes:
        memory_gb: Memory that programs can use, in GiB.
        tflops: Dense bf16 matrix rate, TFLOP/s.
        memory_gb_per_second: Memory bandwidth, 1e9 bytes/s.
        link_gb_per_second: Links between the GPUs of a machine in one direction, 1e9 bytes/s and GPU.
        network_gb_per_second: Network between machines in one direction, 1e9 bytes/s and GPU.
        gpus_per_node: GPUs of a machine.
        matrix_share: Share of ``tflops`` that large matrix products reach.
    """

    memory_gb: float = 0.0
    tflops: float = 0.0
    memory_gb_per_second: float = 0.0
    link_gb_per_second: float = 0.0
    network_gb_per_second: float = 0.0
    gpus_per_node: int = 0
    matrix_share: float = 0.0


def gpu_of(name: str, figures: GpuFigures) -> Gpu:
    """Return the GPU called ``name`` (``own``: from ``figures`` alone) with the given figures replaced.

    Raises:
        InputError: A figure is negative, or ``own`` lacks one.
    """
    given = {field.name: float(getattr(figures, field.name)) for field in fields(figures)}
    for key, value in given.items():
        if value < 0:
            raise InputError(f"--figures.{key} is {value}; give a number above 0.")
        if name == "own" and value == 0:
            raise InputError(f"--gpu own needs --figures.{key}; give all figures, or name a GPU.")
    given = {key: value for key, value in given.items() if value}
    return Gpu(**given) if name == "own" else replace(GPUS[name], **given)
