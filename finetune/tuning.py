"""Which weights learn, and how fast: full, frozen, uppermost layers or LoRA, and layer-wise learning-rate decay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megaprot.common.errors import InputError
from megaprot.finetune.config import OptimConfig, TuningConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.quantization import plain

_LAYER = re.compile(r"(?:^|\.)layer\.(\d+)\.")


def prepare_encoder(encoder: Encoder, tuning: TuningConfig) -> None:
    """Set which of the encoder's weights learn; LoRA changes its layers in place (Hu et al. 2021).

    Raises:
        InputError: More layers are to learn than there are, or LoRA finds none of its modules.
    """
    if tuning.mode == "top_layers":
        if not 1 <= tuning.num_top_layers <= encoder.num_layers:
            raise InputError(f"--tuning.num_top_layers {tuning.num_top_layers}: the encoder has {encoder.num_layers} "
                             "layers; give 1 or more of them.")  # fmt: skip
        lowest = encoder.num_layers - tuning.num_top_layers + 1
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(depth_of(name, encoder.num_layers) >= lowest)
    if tuning.mode == "lora":
        add_lora(encoder.model, tuning)
    for name, parameter in encoder.named_parameters():
        if _is_unused(name):
            parameter.requires_grad_(False)


def _is_unused(name: str) -> bool:
    """Tell parts of transformers' models that nothing here calls."""
    return "contact_head" in name or "pooler" in name


def add_lora(model: Any, tuning: TuningConfig) -> None:
    """Put low-rank updates on the named layers of transformers' model; all else of it is frozen.

    Raises:
        InputError: It has no layer of those names.
    """
    from peft import LoraConfig, get_peft_model

    modules: Any = "all-linear" if tuning.lora_modules == ["all-linear"] else tuning.lora_modules
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=tuning.lora_dropout,
        target_modules=modules,
    )
    try:
        get_peft_model(model, config)
    except ValueError as error:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, part in model.named_modules()
            if isinstance(part, nn.Linear) and not _is_unused(name)
        }
        raise InputError(f"--tuning.lora_modules {' '.join(tuning.lora_modules)}: the encoder's linear layers are "
                         f"called {', '.join(sorted(linear))}; name some of them.") from error  # fmt: skip


def depth_of(name: str, num_layers: int) -> int:
    """Return a parameter's height in the encoder: 0 embeddings, n layer n, ``num_layers`` what stands above too."""
    found = _LAYER.search(name)
    if found:
        return int(found[1]) + 1
    return 0 if "embeddings" in name else num_layers


def parameter_groups(model: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with ``scale``, its share of the scheduled learning rate.

    Layer n of N has ``encoder_lr / lr * layer_decay ** (N - n)``, the head 1 (ULMFiT, Howard & Ruder 2018). Biases and
    norms have no weight decay.

    Args:
        model: Has a ``head``; encoders beside it say ``num_layers``.
        optim: Rates and decay.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        tower = getattr(model, name.split(".")[0])
        if tower is not model.head and hasattr(tower, "num_layers"):
            height = depth_of(name, tower.num_layers)
            scale = (optim.encoder_lr or optim.lr) / optim.lr * optim.layer_decay ** (tower.num_layers - height)
        groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "lr": optim.lr, "weight_decay": optim.weight_decay if decays else 0.0}
        for (scale, decays), parameters in groups.items()
    ]


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of step ``step`` from 0, before a group's scale."""
    warmup = max(1, round(optim.warmup_share * num_steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.decay == "constant":
        return optim.lr
    return optim.lr * (num_steps - step) / max(1, num_steps - warmup + 1)


def plain_weights(tower: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) as transformers has them, LoRA's updates merged in; gathers ZeRO-3's shards in turn.

    All ranks call it. ``tower`` has transformers' model as ``model``.
    """
    from peft.tuners.lora import LoraLayer

    merged: dict[str, Any] = {name: part for name, part in tower.model.named_modules() if isinstance(part, LoraLayer)}
    for name, parameter in tower.model.named_parameters():
        if ".lora_" in name:
            continue
        own_name = name.replace(".base_layer.", ".")
        owner = merged.get(own_name.removesuffix(".weight")) if own_name.endswith(".weight") else None
        parts = [parameter, *(owner.parameters() if owner is not None else ())]
        with gathered(parts), torch.no_grad():
            weight = plain(tower.model.get_submodule(name.rpartition(".")[0]), parameter)
            if owner is not None:
                weight = weight + owner.get_delta_weight("default").float()
            yield own_name, weight.clone()


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which ZeRO-3's sharded parameters are whole on every rank; without shards it does nothing."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded))
