"""GPUs: which, how they are linked, and whether they reach what their data sheet promises."""

from __future__ import annotations

from collections.abc import Iterator

from megaprot.tools.diagnosis.finding import Finding
from megaprot.tools.planning.gpus import GIB, GPUS, Gpu

_SHEETS = {
    "A100-SXM4-40GB": "a100-40",
    "A100-SXM4-80GB": "a100-80",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
    "B300": "b300",
}
LEAST_MATRIX_SHARE = 0.55
LEAST_COPY_SHARE = 0.7
_MATRIX_SIZE, _COPY_BYTES, _ROUNDS = 8192, 1 << 30, 10


def sheet_of(name: str) -> Gpu | None:
    """Return the data sheet of a device by torch's name for it, None where there is none."""
    return next((GPUS[sheet] for part, sheet in _SHEETS.items() if part in name), None)


def judge_rate(name: str, measured: float, promised: float, least_share: float, unit: str) -> Finding:
    """Return whether a measured rate is near enough to the data sheet's; ``promised`` 0 means unknown."""
    if not promised:
        return Finding(name, "ok", "no data sheet of this device to compare with", "", measured, unit)
    detail = f"{100 * measured / promised:.0f} % of the data sheet"
    if measured >= least_share * promised:
        return Finding(name, "ok", detail, "", measured, unit)
    remedy = "look at clocks, power cap, temperature and other users of the device (nvidia-smi -q), or drain the node."
    slow = f"slow: {detail}, at least {100 * least_share:.0f} % expected"
    return Finding(name, "warning", slow, remedy, measured, unit)


def _seconds(work: object, device: int) -> float:
    """Return the seconds of one call of ``work`` on a CUDA device, after one to warm up."""
    import torch

    assert callable(work)
    work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_ROUNDS):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000.0 / _ROUNDS


def check_device_rates(device: int) -> Iterator[Finding]:
    """Measure bf16 matrix products and copies within the memory of one device."""
    import torch

    sheet = sheet_of(torch.cuda.get_device_name(device))
    with torch.cuda.device(device):
        left = torch.randn((_MATRIX_SIZE, _MATRIX_SIZE), device="cuda", dtype=torch.bfloat16)
        tflops = 2 * _MATRIX_SIZE**3 / _seconds(lambda: left @ left, device) / 1e12
        source = torch.empty(_COPY_BYTES, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        copied = 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source), device) / 1e9
    name, promised = f"GPU {device}", sheet.tflops if sheet else 0.0
    yield judge_rate(f"{name} matrix rate", tflops, promised, LEAST_MATRIX_SHARE, "TFLOP/s")
    promised = sheet.memory_gb_per_second if sheet else 0.0
    yield judge_rate(f"{name} copy bandwidth", copied, promised, LEAST_COPY_SHARE, "GB/s")


def check_links(num_devices: int) -> Finding:
    """Find whether every pair of devices can read each other's memory directly."""
    import torch

    pairs = [(one, other) for one in range(num_devices) for other in range(num_devices) if one != other]
    apart = [f"{one}-{other}" for one, other in pairs if not torch.cuda.can_device_access_peer(one, other)]
    if not apart:
        return Finding("GPU links", "ok", f"all {len(pairs)} directions are direct")
    remedy = "see nvidia-smi topo -m; tensor parallelism over these pairs goes through the host's memory."
    return Finding("GPU links", "warning", f"no direct access: {', '.join(apart)}", remedy)


def check_devices() -> list[Finding]:
    """Return all of this module's findings; one, skipped, where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPUs", "skipped", "no CUDA device; training would run on the CPU")]
    num_devices = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(device) for device in range(num_devices)]
    memory = min(torch.cuda.get_device_properties(device).total_memory for device in range(num_devices)) / GIB
    if len(set(names)) > 1:
        remedy = "ask for nodes with GPUs of one kind: the slowest sets the pace."
        findings = [Finding("GPUs", "warning", ", ".join(names), remedy)]
    else:
        findings = [Finding("GPUs", "ok", f"{num_devices} x {names[0]}, {memory:.0f} GiB")]
    if num_devices > 1:
        findings.append(check_links(num_devices))
    for device in range(num_devices):
        findings += check_device_rates(device)
    return findings
