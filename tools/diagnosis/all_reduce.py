"""One process of the doctor's all-reduce: joins, adds up a tensor, prints the rate and all clocks as JSON."""

from __future__ import annotations

import datetime
import json
import os
import time

ELEMENTS = 4 << 20
ROUNDS = 3
TIMEOUT_SECONDS = 60.0


def main() -> None:
    """Add up ``ELEMENTS`` floats ``ROUNDS`` times with all processes; raises where the sum is wrong."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.is_available() and torch.cuda.device_count() > local
    if use_cuda:
        torch.cuda.set_device(local)
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)
    values = torch.full((ELEMENTS,), float(rank + 1), device="cuda" if use_cuda else "cpu")
    dist.all_reduce(values)  # the first one builds connections
    expected = world * (world + 1) / 2
    if not torch.all(values == expected):
        raise SystemExit(f"rank {rank}: the sum is {float(values[0])}, not {expected}")
    dist.barrier()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    if use_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / ROUNDS
    moved = 2 * (world - 1) / world * values.numel() * values.element_size()
    clocks = torch.zeros(world, dtype=torch.float64, device=values.device)
    dist.barrier()
    clocks[rank] = time.time()
    dist.all_reduce(clocks)
    print(json.dumps({"gb_per_second": moved / seconds / 1e9, "clocks": clocks.tolist()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
