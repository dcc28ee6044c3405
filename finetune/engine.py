"""DeepSpeed as the engine of one step: any number of micro-batches, one global mean, one update."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaprot.common.quiet import quiet
from megaprot.finetune.config import EngineConfig, OptimConfig, TrainConfig
from megaprot.finetune.gradient_caching import Block, cached_step
from megaprot.finetune.micro_batches import MicroBatch
from megaprot.finetune.processes import Place
from megaprot.finetune.task import Task
from megaprot.finetune.tuning import parameter_groups


def import_deepspeed() -> Any:
    """Return the package, quiet, and without the operators that it would compile at the first collective on a CPU."""
    quiet("deepspeed")
    quiet("bitsandbytes")  # which peft imports where it is installed, and which names the faster kernels it has not
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as operators

    if not torch.cuda.is_available():
        operators["deepspeed_shm_comm"] = False  # gloo does without, and no compiler is needed
    return deepspeed


@dataclass(frozen=True)
class StepResult:
    """What a step gave on this process.

    Attributes:
        loss: Sum of the losses of this process's labels, over the step's labels on all processes.
        num_residues: Residues read here.
        grad_norm: Norm of the gradients before clipping, the same on all processes; nan where DeepSpeed keeps none.
    """

    loss: float
    num_residues: int
    grad_norm: float


class Engine:
    """A task's model under DeepSpeed.

    Args:
        model: Encoder and head on this process's device.
        task: Gives losses and weights.
        optim: AdamW.
        train: Precision.
        engine: ZeRO stage.
        place: This process.
    """

    def __init__(
        self, model: Any, task: Task, optim: OptimConfig, train: TrainConfig, engine: EngineConfig, place: Place
    ) -> None:
        deepspeed = import_deepspeed()
        self.task, self.place = task, place
        groups = parameter_groups(model, optim)
        self.scales = [group.pop("scale") for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.epsilon)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # batches are made here; DeepSpeed only needs some number
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_grad,
            "zero_optimization": {"stage": engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if train.precision != "fp32":
            settings[train.precision] = {"enabled": True}
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )

    @property
    def model(self) -> nn.Module:
        """The model within; its weights may be sharded."""
        model: nn.Module = self.deepspeed.module
        return model

    def outputs(self, examples: Sequence[Any], seed: int) -> Any:
        """Return the model's outputs for examples in training; all processes call it equally often."""
        encoder: Any = self.model.encoder
        return self.deepspeed(self.task.collate(encoder, examples, seed).to(self.place.device))

    def take_step(
        self, examples: Sequence[Any], batches: Sequence[MicroBatch], total_weight: float, lr: float, seed: int
    ) -> StepResult:
        """Take one optimizer step on this process's micro-batches.

        The gradient is that of the mean over all labels of the step, on whichever process and in whichever micro-batch
        they are: each micro-batch's sum of losses is divided by ``total_weight``, and multiplied by the number of
        processes, over which DeepSpeed averages.

        Args:
            examples: The training split.
            batches: Of this process; all processes have as many.
            total_weight: Labels of the step on all processes.
            lr: Learning rate before the groups' scales.
            seed: Of what the task draws for this step.
        """
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale
        self.deepspeed.train()
        total = max(total_weight, 1.0)
        block = self.task.block(self.model, examples, batches, seed)
        if block is not None:
            return self._take_block(block, total)
        loss_sum, num_residues = 0.0, 0
        for place, batch in enumerate(batches):
            members = [examples[member] for member in batch.members]
            loss = self.task.loss(self.outputs(members, seed), members) / total
            if batch.is_blank:
                loss = loss * 0.0
            else:
                loss_sum += float(loss.detach())
                num_residues += sum(map(self.task.num_residues, members))
            self._backward(loss, is_last=place == len(batches) - 1)
        return StepResult(loss_sum, num_residues, self._grad_norm())

    def _take_block(self, block: Block, total: float) -> StepResult:
        """Take a step whose micro-batches have one loss together."""
        share = 0.0 if block.is_blank else 1.0 / total
        loss = cached_step(
            self.deepspeed,
            block,
            lambda outputs: self.task.loss(outputs, block.members) * share,
            self._backward,
            self.place.device,
        )
        num_residues = 0 if block.is_blank else sum(map(self.task.num_residues, block.members))
        return StepResult(float(loss), num_residues, self._grad_norm())

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradient; after the last of a step the weights move."""
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss * self.place.world_size, scale_wrt_gas=False)
        self.deepspeed.step()

    def _grad_norm(self) -> float:
        norm: Tensor | float | None = self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)
