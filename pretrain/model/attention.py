"""Packed attention: block-diagonal over the sequences of a row, positions restarting in each.

Four kernels compute the same thing; the run names the one it uses and a missing one is an error, never replaced:

* ``sdpa``: ``scaled_dot_product_attention`` sequence by sequence, on any device and in any precision;
* ``cpu``: kernels of its own for the CPU in bf16 (``cpu_attention.py``): several times as fast there;
* ``varlen``: ``torch.nn.attention.varlen``, flash attention over ``cu_seqlens`` (CUDA, bf16 or fp16);
* ``te``: Transformer Engine's fused attention in its packed ("thd") layout (CUDA).
"""

from __future__ import annotations

import importlib.util
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megaprot.common.errors import InputError
from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.model.cpu_attention import Rotation, SegmentAttention


@dataclass
class PackedSequences(PackedSeqParams):
    """What attention must know of a packed row; travels through megatron-core as its ``packed_seq_params``.

    Attributes:
        segment_lengths: Tokens of each segment, on the host, so that no kernel has to ask the device.
        rotation: Rotary table of the tokens; None without rotary positions.
        query_positions: The tokens that attend, ascending [queries]; None: all.
        query_lengths: How many tokens of each segment attend, on the host.
        query_rotation: Rotary table of the tokens that attend.
        asked: The same row for the last layer, where only those tokens attend of which a prediction is asked.
    """

    segment_lengths: tuple[int, ...] = ()
    rotation: Rotation | None = None
    query_positions: Tensor | None = None
    query_lengths: tuple[int, ...] = ()
    query_rotation: Rotation | None = None
    asked: PackedSequences | None = None

    def attended_from(self, positions: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> PackedSequences:
        """Return the row with only some of its tokens attending.

        Args:
            positions: Those tokens, ascending [queries].
            cu_seqlens: int32 bounds of each segment's among them [num_segments + 1].
            lengths: The same as lengths, on the host.
        """
        limited = copy(self)
        limited.cu_seqlens_q, limited.max_seqlen_q = cu_seqlens, max(lengths)
        limited.query_positions, limited.query_lengths = positions, lengths
        limited.query_rotation = self.rotation and (self.rotation[0][positions], self.rotation[1][positions])
        return limited


def pack_sequences(
    cu_seqlens: Tensor, segment_lengths: tuple[int, ...], rotation: Rotation | None = None
) -> PackedSequences:
    """Return the row whose segments have these bounds, on the device and as lengths on the host; all tokens attend."""
    longest = max(segment_lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        segment_lengths=segment_lengths,
        rotation=rotation,
        query_lengths=segment_lengths,
        query_rotation=rotation,
    )


def rotary_table(positions: Tensor, head_size: int, base: float = 10000.0) -> Rotation:
    """Return cosines and sines of rotary embeddings (Su et al. 2021) gathered by position.

    Args:
        positions: Position of each token in its sequence [row_tokens].
        head_size: Channels of one attention head (even).
        base: Base of the geometric series of wave lengths.

    Returns:
        Two fp32 tensors [row_tokens, 1, head_size]; both halves of the last axis hold the same angles.
    """
    steps = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * (base ** (-steps / head_size))[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def apply_rotary(states_tnd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate query or key states [tokens, heads, head_size] by their positions, in fp32, back in their own type."""
    states = states_tnd.float()
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states_tnd.dtype)


def rotate(query: Tensor, key: Tensor, of_query: Rotation, of_key: Rotation) -> tuple[Tensor, Tensor]:
    """Apply ``apply_rotary`` to query and key; compiled on GPUs, so that fp32 stays in registers."""
    return apply_rotary(query, *of_query), apply_rotary(key, *of_key)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, dropout: float) -> Tensor:
    outputs, lengths = [], packed.segment_lengths
    segments = query.split(packed.query_lengths), key.split(lengths), value.split(lengths)
    for parts in zip(*segments, strict=True):
        query_nld, key_nld, value_nld = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        attended = scaled_dot_product_attention(query_nld, key_nld, value_nld, dropout_p=dropout)
        outputs.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _cpu(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, dropout: float) -> Tensor:
    rotations = packed.query_rotation, packed.rotation
    attended = SegmentAttention.apply(query, key, value, *rotations, packed.query_lengths, packed.segment_lengths)
    assert isinstance(attended, Tensor)  # torch does not say what apply returns
    return attended


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = (packed.cu_seqlens_q, packed.cu_seqlens_kv), (packed.max_seqlen_q, packed.max_seqlen_kv)
    attended = varlen_attn(query, key, value, *bounds, *longest)
    assert isinstance(attended, Tensor)  # a pair only when auxiliary output is asked for
    return attended


def _problem(name: str, model: ModelConfig, precision: str) -> str:
    """Return why attention kernel ``name`` cannot run here, or an empty string."""
    head_size = model.hidden_size // model.num_attention_heads
    if name == "sdpa":
        return ""
    if name in ("cpu", "varlen") and model.attention_dropout > 0:
        return "has no attention dropout"
    if name == "cpu":
        if torch.cuda.is_available():
            return "is for machines without a GPU"
        if head_size % 2:
            return f"needs an even head size, not {head_size}"
        return "" if precision == "bf16" else "runs in bf16 only"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if head_size % 8 or head_size > 256:
        return f"needs a head size that is a multiple of 8 and at most 256, not {head_size}"
    if precision == "fp32":
        return "runs in bf16 or fp16 only"
    if name == "te":
        missing = importlib.util.find_spec("transformer_engine") is None
        return "needs the package transformer-engine (pip install megaprot[gpu])" if missing else ""
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return "" if has_varlen else f"needs torch 2.10 or newer, this is {torch.__version__}"


def resolve_backend(model: ModelConfig, precision: str) -> str:
    """Return the attention kernel to use: the one asked for, or for ``auto`` the fastest that can run here.

    Args:
        model: Shape, attention dropout and ``attention_backend``.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        InputError: The kernel that was asked for cannot run here.
    """
    name = model.attention_backend
    if name == "auto":
        candidates = ("varlen", "te", "cpu", "sdpa")
        return next(one for one in candidates if not _problem(one, model, precision))
    problem = _problem(name, model, precision)
    if problem:
        raise InputError(f"model.attention_backend: {name} {problem}; choose auto or sdpa, or change that.")
    return name


class PackedAttention(torch.nn.Module):
    """The core attention of a layer, plugged into megatron-core's ``SelfAttention`` by its module spec.

    Args:
        backend: ``sdpa``, ``cpu``, ``varlen`` or ``te``.
        config: Engine configuration.
        layer_number: Number of the layer, from 1.
        options: The other arguments megatron-core passes; handed on to Transformer Engine.
    """

    def __init__(self, backend: str, config: TransformerConfig, layer_number: int, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.attention_dropout
        self.kernel: Any = {"sdpa": _sdpa, "cpu": _cpu, "varlen": _varlen}.get(backend)
        self.rotate: Any = torch.compile(rotate, dynamic=False) if torch.cuda.is_available() else rotate
        if backend == "te":
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            self.transformer_engine = TEDotProductAttention(config=config, layer_number=layer_number, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Attend within each sequence of the row.

        Args:
            query: [row_tokens, heads of this rank, head_size], also of tokens that do not attend; ``key`` and ``value``
                alike.
            attention_mask: Not used: the segments of ``packed_seq_params`` are the mask.
            attn_mask_type: Handed on to Transformer Engine.
            attention_bias: Not used.
            packed_seq_params: The row's segments and rotary tables.

        Returns:
            [tokens that attend, heads of this rank * head_size].
        """
        packed = packed_seq_params
        assert packed is not None, "packed attention needs the row's segments"
        if packed.query_positions is not None:
            query = query[packed.query_positions]
        if packed.rotation is not None and self.kernel is not _cpu:  # which rotates on its way
            query, key = self.rotate(query, key, packed.query_rotation, packed.rotation)
        if self.kernel is None:
            return self.transformer_engine(
                query, key, value, None, attn_mask_type=attn_mask_type, packed_seq_params=packed
            )
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 or self.config.sequence_parallel:
            # Under sequence parallelism the whole block already runs on the tracker's per-rank state.
            attended = self.kernel(query, key, value, packed, dropout)
        else:
            # Heads differ between tensor-parallel ranks, so their dropout must too: the tracker's per-rank state.
            with get_cuda_rng_tracker().fork():
                attended = self.kernel(query, key, value, packed, dropout)
        return attended.flatten(1)
