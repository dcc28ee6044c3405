"""Run megatron-core without a CUDA device: gloo for communication, CPU tensors for everything else.

megatron-core asks for CUDA by name in its optimizer, schedules, pipeline messages and random-state tracker. This
module redirects those requests to the CPU, once per process and only where no CUDA device exists:

* ``torch.cuda`` functions that name the current device, its random state, streams and events get CPU stand-ins;
* a ``TorchFunctionMode`` sends ``device="cuda"`` arguments to the CPU, makes ``Tensor.cuda()`` the identity and lets
  ``Tensor.type()`` say ``torch.cuda.FloatTensor``, the string megatron-core's optimizers compare with.

Nothing of the parallel code itself changes: groups, schedules, reductions and checkpoints are the ones GPUs run.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


class _Stream:
    """Stands for a CUDA stream or event: CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    wait_stream = synchronize = wait_event = record = wait = _nothing

    def record_event(self, *_: Any) -> _Stream:
        """Return an event that has already happened."""
        return self

    def query(self) -> bool:
        """Say that everything asked for is done."""
        return True


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class _RedirectToCpu(TorchFunctionMode):
    """Sends every CUDA request that goes through the torch function protocol to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def install() -> None:
    """Redirect megatron-core's CUDA requests to the CPU for the rest of this process; a second call changes nothing."""
    if _installed:
        return
    import megatron.core.tensor_parallel.random as tracker  # its module-level functions are what the tracker calls

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.get_rng_state = _get_state
    cuda.set_rng_state = _set_state
    cuda.manual_seed = torch.manual_seed
    cuda.synchronize = cuda.empty_cache = lambda *_, **__: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    random_state: Any = tracker
    random_state._set_cuda_rng_state = _set_state
    random_state._get_cuda_rng_state = _get_state
    # megatron-core looks at gradients of pipeline tensors; through the mode torch blames this module for it.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    mode = _RedirectToCpu()
    mode.__enter__()
    _installed.append(mode)
