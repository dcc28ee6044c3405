"""The feed-forward layer with bias and GELU in one pass: erf or tanh, whichever the configuration says.

megatron-core's own fusion of the two is tanh whatever the configuration says. Here a kernel of ours does it on the CPU
in bf16, a function compiled by torch on GPUs; elsewhere it is torch's operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu

from megaprot.pretrain.model import cpu_kernels
from megaprot.pretrain.model.cpu_threads import bits, on_all_threads
from megaprot.pretrain.model.linears import linear_layers

# Tokens a thread takes at once; sums over them are added in order, so that results do not depend on threads.
TOKENS_AT_ONCE = 512


class CpuBiasGelu(torch.autograd.Function):
    """GELU(states + bias) of bf16 tensors on the CPU: ``apply(states [..., channels], bias [channels], is_tanh)``."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, bias: Tensor, is_tanh: bool) -> Tensor:
        """Compute it, keeping the states before the bias."""
        states = states.contiguous()
        ctx.save_for_backward(states, bias)
        ctx.is_tanh = is_tanh
        output = torch.empty_like(states)
        parts = zip(_parts(states), _parts(output), strict=True)
        on_all_threads([partial(cpu_kernels.bias_gelu, before, bits(bias), is_tanh, after) for before, after in parts])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states and bias."""
        states, bias = ctx.saved_tensors
        of_output, of_states = gradients[0].contiguous(), torch.empty_like(states)
        parts = [_parts(tensor) for tensor in (states, of_output, of_states)]
        of_bias = np.zeros((len(parts[0]), len(bias)), np.float32)
        on_all_threads([
            partial(cpu_kernels.bias_gelu_backward, before, bits(bias), ctx.is_tanh, given, result, total)
            for before, given, result, total in zip(*parts, of_bias, strict=True)
        ])  # fmt: skip
        return of_states, torch.from_numpy(of_bias.sum(axis=0)).to(bias.dtype), None


def _parts(states: Tensor) -> list[cpu_kernels.Bits]:
    """Return a contiguous tensor's bits as pieces [``TOKENS_AT_ONCE`` or fewer, channels]."""
    return [bits(part) for part in states.view(-1, states.shape[-1]).split(TOKENS_AT_ONCE)]


def bias_gelu(states: Tensor, bias: Tensor, is_tanh: bool) -> Tensor:
    """Return GELU(states + bias) by torch's operators; ``states`` [..., channels], ``bias`` [channels]."""
    return gelu(states + bias, approximate="tanh" if is_tanh else "none")


class FeedForward(MLP):
    """megatron-core's feed-forward layer, its bias and activation fused.

    Args:
        config: Engine configuration; ``activation_func`` is one of ``engine.ACTIVATIONS``.
    """

    def __init__(self, config: TransformerConfig) -> None:
        column, row = linear_layers(has_fp8=config.fp8 is not None)
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=column, linear_fc2=row),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=get_tensor_model_parallel_group(),
        )
        self.is_tanh = config.activation_func is not gelu
        self.fused: Any = bias_gelu
        if torch.cuda.is_available():
            self.fused = torch.compile(bias_gelu, dynamic=False)
        elif config.params_dtype == torch.bfloat16:
            self.fused = CpuBiasGelu.apply

    def forward(self, hidden_states: Tensor, *unused: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return the output [tokens, 1, hidden_size] and the bias that is still to be added to it."""
        intermediate, bias = self.linear_fc1(hidden_states)
        output, output_bias = self.linear_fc2(self.fused(intermediate, bias, self.is_tanh))
        return output, output_bias
