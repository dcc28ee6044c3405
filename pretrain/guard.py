"""Which optimizer steps to skip: non-finite values always, spikes against a window of recent steps."""

from __future__ import annotations

import math
import statistics

_FEWEST_STEPS = 16  # with fewer, a standard deviation says little


def _is_spike(value: float, recent: list[float], window: int, sigma: float) -> bool:
    if len(recent) < min(window, _FEWEST_STEPS):
        return False
    # A window of near-constant values must not make every small rise a spike.
    spread = max(statistics.pstdev(recent), 1e-3 * abs(statistics.fmean(recent)))
    return value > statistics.fmean(recent) + sigma * spread


def reason_to_skip(
    loss: float,
    grad_norm: float,
    recent_losses: list[float],
    recent_grad_norms: list[float],
    window: int,
    sigma: float,
) -> str:
    """Return why this step must not change the weights, or an empty string (after OLMo-core's ``SkipStepOptimizer``).

    Args:
        loss: Mean loss of the global batch.
        grad_norm: Gradient norm before clipping.
        recent_losses: Finite losses of recent steps, skipped ones too.
        recent_grad_norms: Their gradient norms.
        window: Length of the window; 0 switches the spike test off.
        sigma: Standard deviations above the mean that make a spike.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    if window and _is_spike(loss, recent_losses, window, sigma):
        return f"loss {loss:.4g} is a spike"
    if window and _is_spike(grad_norm, recent_grad_norms, window, sigma):
        return f"gradient norm {grad_norm:.4g} is a spike"
    return ""


def remember(value: float, recent: list[float], window: int) -> None:
    """Append ``value`` to ``recent``, keeping the newest ``window`` values."""
    recent.append(value)
    del recent[: max(0, len(recent) - window)]
