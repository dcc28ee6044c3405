"""AdamW in the layout megatron-core's checkpoints expect, the optimizer around it, and the learning rate by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megaprot.pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from megaprot.pretrain.engine import PRECISIONS


class AdamW(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov & Hutter 2019) on torch's fused kernel, CPU and CUDA alike.

    Equal to ``torch.optim.AdamW(fused=True)`` but for one thing: the step count lives in the parameter group, as in
    apex's and Transformer Engine's fused Adams. megatron-core's reshardable optimizer state is written for that layout
    and cannot be loaded back into torch's own class, which keeps a count beside each parameter.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decays of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        adam_w_mode: Always True; megatron-core passes it to the fused Adams.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is offered"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def create_moments(self) -> None:
        """Start the moments of parameters that have none yet at zero: a run may be saved before its first update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.create_moments()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            group["step"] = int(group["step"]) + 1
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        # Filled on the device: a copy from the host would wait for all that the device still has to do.
        count = torch.full((), float(group["step"]), device=parameters[0].device)
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [count] * len(parameters),
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class ReshardableOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer, with the gathered state of padded buffers put right.

    When saving, megatron-core gathers each buffer without the padding between its buckets but cuts parameters out of it
    by offsets that count the padding. A tied embedding has a bucket of its own, so from the second bucket on, momenta
    of other parameters would be saved under each name. Here the padding is put back before the cutting.
    """

    def get_parameter_state_dp_zero(self, *args: Any, **options: Any) -> dict[Any, Any] | None:
        """Return the gathered state by buffer and data type, offsets as in ``param_index_map``."""
        state = super().get_parameter_state_dp_zero(*args, **options)
        for number, buffer in enumerate(self.buffers) if state is not None else ():
            for tensors in state[number].values():
                for name, gathered in tensors.items():
                    if isinstance(gathered, Tensor):
                        tensors[name] = _with_padding(gathered, buffer)
        return state


def _with_padding(gathered: Tensor, buffer: Any) -> Tensor:
    padded = gathered.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = gathered[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return padded


def build_optimizer(
    optim: OptimConfig, train: TrainConfig, parallel: ParallelConfig, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Return megatron-core's (distributed) mixed-precision optimizer around our AdamW; no decay on biases and norms.

    megatron-core takes whichever fused Adam it finds installed; here it is always given ours, under apex's name (same
    layout of the state), so that what runs does not depend on the machine.
    """
    module: Any = megatron_optimizer
    module.Adam, module.USING_PYTORCH_OPTIMIZER = AdamW, False
    sharded: Any = module.distrib_optimizer
    sharded.Adam, sharded.HAVE_APEX_OR_TE = AdamW, True
    sharded.USING_APEX_OPTIMIZER, sharded.USING_TE_OPTIMIZER = True, False
    module.DistributedOptimizer = ReshardableOptimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.clip_grad,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        params_dtype=PRECISIONS[train.precision],
        initial_loss_scale=train.initial_loss_scale,
        min_loss_scale=1.0,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_communication and parallel.distributed_optimizer,
    )
    optimizer = megatron_optimizer.get_megatron_optimizer(
        config, chunks, config_overrides=get_standard_config_overrides(config), use_gloo_process_groups=True
    )
    for part in optimizer.chained_optimizers:
        part.optimizer.create_moments()
    apply_settings(optimizer, optim)
    return optimizer


def squared_gradient_norm(optimizer: MegatronOptimizer, data_size: int) -> Tensor:
    """Return this rank's part of the squared norm of all gradients, fp64, on their device: the parts add up to it.

    Replicas under data parallelism give an equal share each; megatron-core leaves out what several tensor-parallel
    ranks or pipeline stages hold. Unlike its ``get_grad_norm`` this does not wait for the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for part in optimizer.chained_optimizers:
        gradients = part.get_main_grads_for_grad_norm()
        if gradients:
            squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
            total += squares if isinstance(part, DistributedOptimizer) else squares / data_size
    return total


def apply_settings(optimizer: MegatronOptimizer, optim: OptimConfig) -> None:
    """Give every parameter group the decays and the epsilon of ``optim``; no weight decay on biases and LayerNorms.

    megatron-core only marks those (``wd_mult``) and leaves it to its scheduler to act; and loading a checkpoint brings
    back the settings it was saved with, which a restart may have changed.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = (optim.beta1, optim.beta2), optim.epsilon


def learning_rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0): linear warm-up, then the chosen decay, then flat.

    Args:
        step: Steps already taken.
        optim: Peak, floor, warm-up and decay.
        num_steps: Length of the run, where the decay ends unless ``optim.decay_steps`` says otherwise.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.decay == "constant":
        return optim.lr
    end = optim.decay_steps or num_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps))
    if optim.decay == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return optim.lr + (optim.min_lr - optim.lr) * progress


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """Give every parameter group the learning rate ``value``."""
    for group in optimizer.param_groups:
        group["lr"] = value
