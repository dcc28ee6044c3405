"""Versions, and which fused parts are there."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megaprot.tools.diagnosis.finding import Finding

LEAST_PYTHON = (3, 11)
MEGATRON_SERIES = "0.16."
FIRST_MEGATRON_PATCH = 1


def check_python() -> Finding:
    """Find the interpreter's version."""
    found = platform.python_version()
    if sys.version_info[:2] >= LEAST_PYTHON:
        return Finding("python", "ok", found)
    return Finding("python", "failed", found, "install Python 3.11 or newer.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def check_torch() -> list[Finding]:
    """Find torch, the CUDA and NCCL it was built with, and whether it sees a device."""
    found = _version("torch")
    if not found:
        return [Finding("torch", "failed", "not installed", "pip install 'torch>=2.10'.")]
    import torch

    if tuple(map(int, found.split("+")[0].split(".")[:2])) < (2, 10):
        return [Finding("torch", "failed", found, "pip install 'torch>=2.10': packed flash attention needs it.")]
    findings = [Finding("torch", "ok", found)]
    if torch.version.cuda is None:
        remedy = "install a torch built with CUDA, if this machine has GPUs."
        return [*findings, Finding("cuda", "warning", "torch was built without CUDA", remedy)]
    if not torch.cuda.is_available():
        remedy = "see that nvidia-smi works here and that its driver is new enough for this CUDA."
        return [*findings, Finding("cuda", "failed", f"{torch.version.cuda}, but no device is usable", remedy)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [*findings, Finding("cuda", "ok", str(torch.version.cuda)), Finding("nccl", "ok", nccl)]


def check_megatron_core() -> Finding:
    """Find megatron-core and whether it is of the series this package was written for."""
    found = _version("megatron-core")
    remedy = f"pip install 'megatron-core>={MEGATRON_SERIES}{FIRST_MEGATRON_PATCH},<0.17'."
    if not found:
        return Finding("megatron-core", "failed", "not installed", remedy)
    patch = found.removeprefix(MEGATRON_SERIES).split(".")[0]
    if not found.startswith(MEGATRON_SERIES) or not patch.isdigit() or int(patch) < FIRST_MEGATRON_PATCH:
        return Finding("megatron-core", "failed", found, remedy)
    return Finding("megatron-core", "ok", found)


def check_megaprot() -> Finding:
    """Find this package's own version: nodes must agree."""
    return Finding("megaprot", "ok", _version("megaprot") or "not installed as a package")


def check_apex() -> Finding:
    """Find apex and whether it is NVIDIA's: the project of that name on PyPI is something else.

    Nothing is imported: NVIDIA's has the folders ``multi_tensor_apply`` and ``optimizers``.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return Finding("apex", "skipped", "not installed (not needed: torch's fused AdamW is used)")
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    if any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return Finding("apex", "ok", f"NVIDIA's, {_version('apex') or 'built from source'}")
    where = folders[0] if folders else Path(found.origin or "")
    remedy = "pip uninstall apex: that of PyPI is another project; NVIDIA's is built from github.com/NVIDIA/apex."
    return Finding("apex", "failed", f"{where} is not NVIDIA's apex, but megatron-core would import it", remedy)


def check_fused_parts() -> Iterator[Finding]:
    """Find the faster kernels a run can choose: Transformer Engine, packed flash attention, fused AdamW."""
    import torch

    cuda = torch.cuda.is_available()
    missing = importlib.util.find_spec("transformer_engine") is None
    if missing:
        yield Finding("transformer-engine", "skipped", "not installed (attention backend te cannot be chosen)")
    else:
        yield Finding("transformer-engine", "ok", _version("transformer-engine") or "found")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        yield Finding("packed attention", "failed", "torch has no varlen attention", "pip install 'torch>=2.10'.")
    elif cuda and torch.cuda.get_device_capability() < (8, 0):
        remedy = "set model.attention_backend sdpa, or use a GPU of compute capability 8.0 or newer."
        yield Finding("packed attention", "warning", "varlen needs a newer GPU", remedy)
    else:
        yield Finding("packed attention", "ok", "varlen" if cuda else "sdpa (varlen needs a CUDA device)")
    fused = hasattr(torch, "_fused_adamw_")
    remedy = "" if fused else "pip install 'torch>=2.10'."
    yield Finding("fused AdamW", "ok" if fused else "failed", "found" if fused else "torch has none", remedy)


def check_software() -> list[Finding]:
    """Return all of this module's findings."""
    findings = [check_python(), *check_torch(), check_megatron_core(), check_megaprot(), check_apex()]
    return [*findings, *check_fused_parts()]
