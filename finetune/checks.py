"""What can be known to be wrong with a configuration before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.finetune.config import FinetuneConfig

_POSITIVE = ("head.hidden_size", "optim.lr", "optim.epsilon", "train.batch_size", "train.log_interval", "seeds",
             "tuning.lora_rank", "tuning.lora_alpha", "engine.timeout_minutes")  # fmt: skip
_NOT_NEGATIVE = ("optim.encoder_lr", "optim.weight_decay", "optim.clip_grad", "train.num_steps", "train.num_epochs",
                 "train.max_tokens", "train.train_examples", "train.eval_interval", "train.valid_examples",
                 "train.patience", "train.save_interval", "train.max_minutes", "labels.num_classes", "seed",
                 "check_processes")  # fmt: skip
_SHARES = ("head.dropout", "tuning.lora_dropout", "optim.warmup_share", "optim.beta1", "optim.beta2")


def check_config(config: FinetuneConfig) -> None:
    """Raise InputError for a value that no run can have.

    The task's heads, the encoder and the data are looked at when they are opened.
    """
    for key in _POSITIVE:
        if not _value(config, key) > 0:
            raise InputError(f"--{key} is {_value(config, key)}; give a number above 0.")
    for key in _NOT_NEGATIVE:
        if _value(config, key) < 0:
            raise InputError(f"--{key} is {_value(config, key)}; give 0 or more.")
    for key in _SHARES:
        if not 0 <= _value(config, key) < 1:
            raise InputError(f"--{key} is {_value(config, key)}; give a share from 0 to below 1.")
    if not 0 < config.optim.layer_decay <= 1:
        raise InputError(f"--optim.layer_decay is {config.optim.layer_decay}; give a factor above 0, at most 1.")
    if not config.train.num_steps and not config.train.num_epochs:
        raise InputError("--train.num_steps and --train.num_epochs are both 0; give one of them.")
    if Path(config.output).is_file():
        raise InputError(f"--output {config.output} is a file; name a folder.")
    _require_packages(config)


def _require_packages(config: FinetuneConfig) -> None:
    """Raise InputError where a package that was asked for is not installed."""
    wanted = {"deepspeed": True, "peft": config.tuning.mode == "lora", "tensorboard": config.log.tensorboard,
              "wandb": bool(config.log.wandb_project)}  # fmt: skip
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"the package {package} is not installed; pip install {package}.")


def _value(config: FinetuneConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
