"""The configuration of a pretraining run: one dataclass a section, every key with its meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """The shape and the variant of ProteinBert (ESM-2's architecture unless said otherwise).

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Attention heads; must divide ``hidden_size`` and be divisible by ``parallel.tensor``.
        ffn_hidden_size: Width of the feed-forward layer; 0 means four times ``hidden_size``.
        position_embedding: ``rotary`` (ESM-2) or ``learned`` absolute positions (ProteinLM).
        activation: ``gelu_erf`` (ESM-2) or ``gelu_tanh`` (ProteinLM); the LM head always uses erf, as Megatron's does.
        layer_norm_epsilon: Added to the variance in every LayerNorm.
        hidden_dropout: Dropout probability on embeddings and residual branches.
        attention_dropout: Dropout probability on attention weights.
        token_dropout: ESM-2's rescaling of embeddings by the share of ``<mask>`` tokens in each sequence.
        initial_std: Standard deviation of initial weights; the two output projections of a layer get
            ``initial_std / sqrt(2 * num_layers)`` as in Megatron-LM.
        attention_backend: ``sdpa`` (anywhere), ``cpu`` (CPU, bf16), ``varlen`` (torch's flash attention, CUDA),
            ``te`` (Transformer Engine); ``auto`` takes the fastest that can run here. The run's first lines name it.
    """

    num_layers: int = 6
    hidden_size: int = 320
    num_attention_heads: int = 20
    ffn_hidden_size: int = 0
    position_embedding: Literal["rotary", "learned"] = "rotary"
    activation: Literal["gelu_erf", "gelu_tanh"] = "gelu_erf"
    layer_norm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    token_dropout: bool = False
    initial_std: float = 0.02
    attention_backend: Literal["auto", "sdpa", "cpu", "varlen", "te"] = "auto"

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layer with the default resolved."""
        return self.ffn_hidden_size or 4 * self.hidden_size


@dataclass
class ParallelConfig:
    """How the model is laid out over processes; data parallelism takes what tensor x pipeline leaves.

    Attributes:
        tensor: Tensor-parallel size.
        pipeline: Number of pipeline stages.
        virtual_pipeline: Model chunks a pipeline stage holds (interleaved schedule); 1 is the plain 1F1B schedule.
        pipeline_layout: Layers of each of the ``pipeline * virtual_pipeline`` chunks in order; empty: even spread,
            earlier chunks taking the remainder.
        sequence: Split LayerNorms, dropouts and the residual stream by tokens over the tensor-parallel ranks.
        distributed_optimizer: Shard optimizer state over data-parallel ranks.
        overlap_communication: Overlap gradient reduction and parameter gathering with computation (GPUs).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    pipeline_layout: list[int] = field(default_factory=list)
    sequence: bool = False
    distributed_optimizer: bool = False
    overlap_communication: bool = False


@dataclass
class DataConfig:
    """What is trained on and how it is packed and masked.

    Attributes:
        path: Folder made by ``megaprot preprocess`` (holds ``train`` and ``valid``).
        blend: Several such folders in place of ``path``, each after its weight: ``0.7 pfam 0.3 uniref50``. Weights are
            shares of the rows, and so of the tokens.
        sampling: ``sequences``: each once an epoch. ``clusters``: of each cluster one member, another draw each epoch.
        row_tokens: Tokens of one micro-batch row, padding included.
        max_sequence_length: Longest sequence in tokens, boundary tokens included; longer ones are cropped at random.
        mask_probability: Share of residues chosen for prediction.
        mask_token_fraction: Of those, the share replaced by the mask token.
        random_fraction: Of those, the share replaced by a random residue; the rest stay as they are.
        mask_span_length: Mean length in residues of masked spans (geometric, at most 10, as SpanBERT's); 1 masks
            residues independently.
        num_workers: Loader processes a rank; 0 builds rows in the training process. The stream is the same.
        plan_folder: Where the packing plans of large corpora are kept, on a disk of each machine; empty: a folder among
            its temporary files.
        verify: Check the whole ``.bin`` checksum at start for corpora up to 1 GB.
    """

    path: str = ""
    blend: list[str] = field(default_factory=list)
    sampling: Literal["sequences", "clusters"] = "sequences"
    row_tokens: int = 2048
    max_sequence_length: int = 1024
    mask_probability: float = 0.15
    mask_token_fraction: float = 0.8
    random_fraction: float = 0.1
    mask_span_length: float = 1.0
    num_workers: int = 0
    plan_folder: str = ""
    verify: bool = True


@dataclass
class OptimConfig:
    """AdamW and the learning-rate schedule.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the decay.
        warmup_steps: Steps of linear warm-up; the first has ``lr / warmup_steps``.
        decay: Shape after warm-up.
        decay_steps: Step at which ``min_lr`` is reached; 0 means ``train.num_steps``.
        weight_decay: Decoupled weight decay; none on biases and LayerNorms.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment.
        clip_grad: Global gradient norm above which gradients are scaled down.
    """

    lr: float = 4e-4
    min_lr: float = 4e-5
    warmup_steps: int = 2000
    decay: Literal["linear", "cosine", "constant"] = "linear"
    decay_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    """Length of the run, batch, precision, intervals and guards.

    Attributes:
        num_steps: Optimizer steps of the whole run.
        global_batch_rows: Rows of ``data.row_tokens`` tokens in one optimizer step, over all ranks.
        ramp_up_start_rows: Batch at the first step; 0 starts with the full batch.
        ramp_up_increment_rows: Rows added at each increase.
        ramp_up_steps: Steps until the full batch is reached.
        precision: Data type of weights and activations; the optimizer keeps fp32 copies.
        fp8: Multiply the layers' matrices in FP8 (Transformer Engine, H100 or newer); pays from some 3B parameters.
        initial_loss_scale: First loss scale of fp16; losses are summed over a row's masked positions, so it is low.
        recompute: Recompute activations in the backward pass: ``none``, ``selective`` (attention) or ``full``.
        log_interval: Steps between log rows.
        eval_interval: Steps between validations; 0 validates at the end only.
        eval_rows: Validation rows used each time; 0 means all.
        save_interval: Steps between checkpoints; 0 saves at the end only.
        background_saves: Copy what is saved to host memory and write it while training goes on; a save is finished at
            a later step, and waited for at the end of the run.
        keep_checkpoints: Newest checkpoints kept; 0 keeps all.
        max_minutes: Wall-clock minutes after which the run saves and ends; 0 means no limit.
        spike_sigma: A loss or gradient norm this many standard deviations above its window's mean skips the step.
        spike_window: Steps in the window; 0 switches the spike test off (non-finite values are always skipped).
        max_skipped_steps: Steps skipped in a row that stop the run.
    """

    num_steps: int = 500_000
    global_batch_rows: int = 1024
    ramp_up_start_rows: int = 0
    ramp_up_increment_rows: int = 0
    ramp_up_steps: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    fp8: bool = False
    initial_loss_scale: float = 4096.0
    recompute: Literal["none", "selective", "full"] = "none"
    log_interval: int = 10
    eval_interval: int = 1000
    eval_rows: int = 0
    save_interval: int = 1000
    background_saves: bool = False
    keep_checkpoints: int = 3
    max_minutes: float = 0.0
    spike_sigma: float = 6.0
    spike_window: int = 128
    max_skipped_steps: int = 20


@dataclass
class RunConfig:
    """Where the run lives and who is told.

    Attributes:
        dir: Run folder; a run whose folder holds a complete checkpoint goes on from it.
        initial_checkpoint: Checkpoint, such as ``megaprot convert --to megatron`` writes, whose weights a new run
            starts with; a run that goes on from its own checkpoint does not read it. Empty: random weights.
        seed: Seed of weights, stream, masks and dropout.
        tensorboard: Also write TensorBoard event files.
        wandb_project: Also log to this Weights & Biases project; empty means no.
        timeout_minutes: Longest wait in one collective before the run is declared hung.
        peak_tflops: Matrix rate of one device for MFU, in TFLOP/s; 0 takes the data sheet of known GPUs.
    """

    dir: str = "runs/pretrain"
    initial_checkpoint: str = ""
    seed: int = 1234
    tensorboard: bool = False
    wandb_project: str = ""
    timeout_minutes: float = 30.0
    peak_tflops: float = 0.0


@dataclass
class PretrainConfig:
    """Everything ``megaprot pretrain`` can be told.

    Attributes:
        model: Shape and variant of the model.
        parallel: Layout over processes.
        data: Corpus, packing and masking.
        optim: Optimizer and learning rate.
        train: Length, batch, precision, intervals, guards.
        run: Run folder, seed, loggers.
        check_processes: Validate configuration and data for this many processes and exit; 0 trains.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    check_processes: int = 0
