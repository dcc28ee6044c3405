"""The configuration of a fine-tuning run: one dataclass a section, every key with its meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megaprot.finetune.config_function import FunctionConfig
from megaprot.finetune.config_ppi import PpiConfig


@dataclass
class LabelConfig:
    """Where labels stand in a table, and how many classes they have; TAPE's records need none of this.

    Attributes:
        sequence: Column of the sequences.
        target: Column of what is to be predicted: a number, a class, or a letter a residue ('.' for none).
        identifier: Column of identifiers; empty numbers the rows.
        num_classes: Classes of the task where it has several kinds (secondary structure: 3 or 8); 0 takes its own.
    """

    sequence: str = "sequence"
    target: str = "target"
    identifier: str = ""
    num_classes: int = 0


@dataclass
class HeadConfig:
    """What turns the encoder's states into predictions.

    Attributes:
        name: One of the task's heads; ``auto`` takes its first, ``tape`` is TAPE's own.
        hidden_size: Width of the hidden layer, or rank of a pair head; ``tape`` has TAPE's own.
        dropout: Dropout of its hidden layer; ``tape`` has TAPE's own.
    """

    name: str = "auto"
    hidden_size: int = 512
    dropout: float = 0.1


@dataclass
class TuningConfig:
    """Which of the encoder's weights learn.

    Attributes:
        mode: ``full``: all. ``frozen``: none, only the head. ``top_layers``: the uppermost. ``lora``: low-rank updates
            of the attention's projections (peft), merged into the weights when the model is written.
        num_top_layers: Layers that learn with ``top_layers``, the final LayerNorm with them.
        lora_rank: Rank of the updates.
        lora_alpha: Their scale is ``lora_alpha / lora_rank``.
        lora_dropout: Dropout of what enters them.
        lora_modules: Names of the linear layers they are put on; ``all-linear`` takes every one.
    """

    mode: Literal["full", "frozen", "top_layers", "lora"] = "full"
    num_top_layers: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_modules: list[str] = field(default_factory=lambda: ["query", "key", "value"])


@dataclass
class OptimConfig:
    """AdamW and the learning-rate schedule: linear warm-up, then linear decay to 0.

    Attributes:
        lr: Peak learning rate of the head and, without ``layer_decay``, of the encoder.
        encoder_lr: Peak learning rate of the encoder's uppermost layer; 0 takes ``lr``.
        layer_decay: Factor of the learning rate from each layer to the one below; 1 gives all the same.
        warmup_share: Share of the steps with linear warm-up.
        decay: Shape after warm-up.
        weight_decay: Decoupled weight decay; none on biases and norms.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
        clip_grad: Global gradient norm above which gradients are scaled down; 0 never.
    """

    lr: float = 1e-4
    encoder_lr: float = 0.0
    layer_decay: float = 1.0
    warmup_share: float = 0.05
    decay: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    """Length of the run, batch, precision and intervals.

    Attributes:
        num_epochs: Passes over the training split, if ``num_steps`` is 0.
        num_steps: Optimizer steps of the whole run; 0 goes by ``num_epochs``.
        batch_size: Proteins of one optimizer step, over all processes.
        max_tokens: Tokens that go through the encoder at once on a process; a step takes as many such micro-batches as
            it needs. A protein above it is a micro-batch of its own. 0 takes 2,048 on a CPU and 16,384 on a GPU.
        train_examples: Training proteins used, drawn by the seed; 0 uses all.
        precision: Data type of weights and activations; the optimizer keeps fp32 copies.
        eval_interval: Steps between evaluations of the validation split; 0 evaluates after each epoch.
        valid_examples: Validation proteins used during training, drawn by the seed; 0 uses all.
        patience: Evaluations without a better value after which the run ends; 0 never.
        log_interval: Steps between log rows.
        save_interval: Steps between saves to resume from; 0 saves at each evaluation.
        max_minutes: Wall-clock minutes after which the run saves and ends; 0 means no limit.
    """

    num_epochs: float = 10.0
    num_steps: int = 0
    batch_size: int = 32
    max_tokens: int = 0
    train_examples: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_interval: int = 0
    valid_examples: int = 0
    patience: int = 0
    log_interval: int = 10
    save_interval: int = 0
    max_minutes: float = 0.0


@dataclass
class EngineConfig:
    """DeepSpeed.

    Attributes:
        zero_stage: What is sharded over processes: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too.
        timeout_minutes: Longest wait in one collective before the run is declared hung.
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    timeout_minutes: float = 30.0


@dataclass
class LogConfig:
    """Who is told beside ``metrics.jsonl``.

    Attributes:
        tensorboard: Also write TensorBoard event files.
        wandb_project: Also log to this Weights & Biases project; empty means no.
    """

    tensorboard: bool = False
    wandb_project: str = ""


@dataclass
class FinetuneConfig:
    """What ``megaprot finetune`` can be told.

    Attributes:
        task: Name of a task, or a Python file that holds one.
        model: Hugging Face folder of the encoder.
        text_model: Hugging Face folder of the text encoder, for the task function: BioBERT, PubMedBERT, MiniLM, ...
        data: TAPE's data folder, the task's own folder with a file a split, or a table with a column ``set``.
        output: Folder of the run; a run whose folder holds a save goes on from it.
        seed: Seed of the head's weights, the order of the proteins and dropout.
        seeds: Runs with this many seeds, from ``seed`` on; the report gives mean and spread.
        sweep: Grid of settings, one key after another: ``optim.lr=1e-4,3e-4 tuning.mode=full,lora``. All combinations
            are run; the best by the validation metric is kept.
        labels: Columns and classes.
        head: What turns states into predictions.
        tuning: Which weights learn.
        optim: Optimizer and learning rate.
        train: Length, batch, precision, intervals.
        engine: DeepSpeed.
        log: Loggers.
        ppi: Settings of the tasks on protein pairs.
        function: Settings of the task function.
        check_processes: Validate for this many processes and exit; 0 trains.
    """

    task: str
    model: str
    data: str
    output: str
    text_model: str = ""
    seed: int = 1
    seeds: int = 1
    sweep: list[str] = field(default_factory=list)
    labels: LabelConfig = field(default_factory=LabelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    ppi: PpiConfig = field(default_factory=PpiConfig)
    function: FunctionConfig = field(default_factory=FunctionConfig)
    check_processes: int = 0
