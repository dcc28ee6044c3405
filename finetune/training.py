"""The fine-tuning loop: one linear pass over the steps of a run, on every process alike."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaprot.common import heartbeat
from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.errors import InputError, RunError
from megaprot.common.files import atomic_write
from megaprot.common.metrics_log import MetricsLog
from megaprot.common.stopping import StopRequest
from megaprot.finetune import saves
from megaprot.finetune.config import FinetuneConfig, LogConfig
from megaprot.finetune.engine import Engine
from megaprot.finetune.evaluation import Evaluated, run_split, split_metrics
from megaprot.finetune.hugging_face import fingerprint, load_encoder
from megaprot.finetune.micro_batches import Order, share, training_tokens
from megaprot.finetune.model_folder import BEST, LAST, write_model
from megaprot.finetune.processes import Place
from megaprot.finetune.saves import Progress
from megaprot.finetune.task import Task
from megaprot.finetune.tuning import learning_rate, prepare_encoder

_FIXED = ("task", "seed", "labels", "head", "tuning", "ppi", "function", "train.batch_size", "train.train_examples",
          "train.precision")  # fmt: skip
"""Keys a run goes on with only as they were."""


@dataclass
class RunLog(LogConfig):
    """Where the numbers of a run go.

    Attributes:
        dir: Folder of ``metrics.jsonl``.
    """

    dir: str = ""


@dataclass(frozen=True)
class RunResult:
    """What a run came to, the same on all processes.

    Attributes:
        best_step: Step of its best validation.
        best_value: The task's metric there.
        num_steps: Steps taken.
        is_finished: Whether no step is left.
        was_stopped: Whether a signal ended it.
    """

    best_step: int
    best_value: float
    num_steps: int
    is_finished: bool
    was_stopped: bool


class Run:
    """A fine-tuning run in progress.

    Args:
        config: The run, validated.
        task: What is learned, with what it took from the training split.
        train: Training split.
        valid: Validation split, as used during training.
        place: This process.
    """

    def __init__(self, config: FinetuneConfig, task: Task, train: list[Any], valid: list[Any], place: Place) -> None:
        self.config, self.task, self.train, self.valid, self.place = config, task, train, valid, place
        self.folder = Path(config.output)
        self.encoder = load_encoder(Path(config.model), with_head=task.needs_lm_head, device=place.device)
        torch.manual_seed(config.seed)
        head = task.build_head(config.head, self.encoder)  # before LoRA, whose weights are drawn after it
        prepare_encoder(self.encoder, config.tuning)
        model = task.build_model(self.encoder, head, config.tuning.mode == "frozen").to(place.device)
        self.engine = Engine(model, task, config.optim, config.train, config.engine, place)
        self.order = Order(len(train), config.train.batch_size, config.seed)
        self.num_steps = config.train.num_steps or math.ceil(config.train.num_epochs * self.order.steps_per_epoch)
        self.lengths = [task.num_tokens(one, self.encoder) for one in train]
        self.weights = [task.weight(one) for one in train]
        self.max_tokens = training_tokens(config.train.max_tokens, place.device.type)
        self.progress = Progress(0, -1, math.nan, 0, run_settings(config, task, train))
        self._resume()

    def _resume(self) -> None:
        """Go on from the newest whole save, if there is one; all processes take the same."""
        found = self.place.from_main(saves.newest(self.folder / "checkpoints") if self.place.is_main else None)
        if found is None:
            return
        heartbeat.mark("loading")
        saves.load(found, self.engine.deepspeed)
        self.progress = saves.read_progress(found)

    def take_step(self) -> tuple[float, int, float]:
        """Take the next step; return this process's loss and residues, and the gradient norm."""
        step = self.progress.step
        heartbeat.mark("training", step)
        members = self.order.members(step)
        world = (self.place.rank, self.place.world_size)
        batches = share(members, self.lengths, self.max_tokens, self.encoder.is_padding_free, *world)
        # Nothing random is carried from step to step, so a resumed run draws the same dropout.
        torch.manual_seed(_mixed(self.config.seed, step, self.place.rank))
        weight = sum(self.weights[member] for member in members)
        lr = learning_rate(step, self.num_steps, self.config.optim)
        # What a task draws, such as masks, is the same on any number of processes only if seeded by step alone.
        result = self.engine.take_step(self.train, batches, weight, lr, _mixed(self.config.seed, step, 0))
        self.progress.step += 1
        return result.loss, result.num_residues, result.grad_norm

    def validate(self) -> Evaluated:
        """Return the predictions for the validation split."""
        heartbeat.mark("validating", self.progress.step)
        self.engine.deepspeed.eval()
        return run_split(
            self.task, self.encoder, self.engine.deepspeed, self.valid, self.place, told=lambda _: heartbeat.progress()
        )

    def save(self) -> None:
        """Write a save to go on from."""
        heartbeat.mark("saving", self.progress.step)
        saves.save(self.folder / "checkpoints", self.engine.deepspeed, self.progress, self.place)

    def write(self, name: str, about: dict[str, Any]) -> None:
        """Write the model as it is now to the run's folder."""
        source, head = Path(self.config.model), self.config.head
        write_model(self.folder / name, self.engine.model, self.task, head, source, about, self.place)


def _mixed(seed: int, step: int, rank: int) -> int:
    """Return a random seed made of three numbers (the multipliers are large odd primes)."""
    return (seed * 1_000_003 + step * 10_007 + rank) % 2**62


def run_settings(config: FinetuneConfig, task: Task, train: list[Any]) -> dict[str, Any]:
    """Return what must be the same for a run to go on, as JSON holds it."""
    digest = hashlib.sha256()
    for example in train:
        digest.update(task.digest_of(example))
    values = asdict(config)
    found = {}
    for key in _FIXED:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    sums = {"model_sha256": fingerprint(Path(config.model)), "train_sha256": digest.hexdigest()}
    if config.text_model:
        sums["text_model_sha256"] = fingerprint(Path(config.text_model))
    return found | {"zero_stage": config.engine.zero_stage, **sums}


def check_resumption(config: FinetuneConfig, task: Task, train: list[Any]) -> None:
    """Raise InputError where the run's folder holds a save of another run."""
    found = saves.newest(Path(config.output) / "checkpoints")
    if found is None:
        return
    before, now = saves.read_progress(found).settings, run_settings(config, task, train)
    for key, value in now.items():
        if before.get(key) != value:
            raise InputError(f"{config.output} holds a run with another {key}; go on with the same settings or name "
                             "another --output.")  # fmt: skip


def train(run: Run, stop: StopRequest) -> RunResult:
    """Take the steps that are left: step, log, validate, save; keep the best and the last model.

    A signal or ``train.max_minutes`` ends the run after its step with a save.

    Raises:
        RunError: The loss is not finite.
    """
    train_config, progress = run.config.train, run.progress
    log = _open_log(run) if run.place.is_main else None
    interval, began = _Interval(), time.monotonic()
    is_stopped = is_late = False
    while not (_is_finished(run) or is_stopped or is_late):
        loss, num_residues, grad_norm = run.take_step()
        interval.add(loss, num_residues)
        minutes = (time.monotonic() - began) / 60
        requests = [float(stop.is_made), float(bool(train_config.max_minutes) and minutes > train_config.max_minutes)]
        is_stopped, is_late = (request > 0 for request in run.place.sum(requests))
        at_end = progress.step >= run.num_steps
        if _due(run, train_config.log_interval) or at_end:
            _log_interval(run, interval, grad_norm, log)
            interval = _Interval()
        is_validated = _due(run, train_config.eval_interval or run.order.steps_per_epoch) or at_end
        if is_validated:
            _validate_and_keep(run, log)
            interval.started = time.monotonic()
        interval_of_saves = train_config.save_interval
        is_due = _due(run, interval_of_saves) if interval_of_saves else is_validated
        if is_stopped or is_late or at_end or is_due:
            run.save()
        if log is not None:
            log.advance(progress.step)
    if _is_finished(run):
        run.write(LAST, {"step": progress.step})
    if log is not None:
        if not _is_finished(run):
            log.say(f"saved at step {progress.step}; start the same command again to go on")
        log.close()
    return RunResult(progress.best_step, progress.best_value, progress.step, _is_finished(run), is_stopped)


def _is_finished(run: Run) -> bool:
    """Tell whether no step is left, or none would help."""
    patience = run.config.train.patience
    return run.progress.step >= run.num_steps or bool(patience and run.progress.num_worse >= patience)


class _Interval:
    """Sums since the last log row, of this process."""

    def __init__(self) -> None:
        self.loss, self.num_residues, self.num_steps = 0.0, 0, 0
        self.started = time.monotonic()

    def add(self, loss: float, num_residues: int) -> None:
        """Add one step."""
        self.loss += loss
        self.num_residues += num_residues
        self.num_steps += 1


def _log_interval(run: Run, interval: _Interval, grad_norm: float, log: MetricsLog | None) -> None:
    """Write the row of an interval, summed over processes."""
    loss, residues = run.place.sum([interval.loss, float(interval.num_residues)])
    seconds = max(time.monotonic() - interval.started, 1e-9)
    mean = loss / interval.num_steps
    if not math.isfinite(mean):
        raise RunError(f"the loss is {mean} at step {run.progress.step}; lower --optim.lr, or use --train.precision "
                       "fp32.")  # fmt: skip
    if log is not None:
        lr = learning_rate(run.progress.step - 1, run.num_steps, run.config.optim)
        row = {"step": run.progress.step, "loss": mean, "lr": lr, "residues_per_second": residues / seconds}
        if math.isfinite(grad_norm):
            row["grad_norm"] = grad_norm
        log.write(row)
        log.say(f"step {run.progress.step:>6}/{run.num_steps}  loss {mean:.4f}  lr {lr:.2e}  "
                f"{row['residues_per_second']:,.0f} residues/s")  # fmt: skip


def _validate_and_keep(run: Run, log: MetricsLog | None) -> None:
    """Measure the validation split; write the model where it is the best so far."""
    progress, task = run.progress, run.task
    evaluated = run.validate()
    values: dict[str, float] = {}
    if run.place.is_main:
        task.finish(run.valid, evaluated.outcomes)
        values = {name: one.value for name, one in split_metrics(task, run.valid, evaluated, 0).items()}
    values = run.place.from_main(values)
    value = values[task.metric]
    is_better = progress.best_step < 0 or (
        math.isfinite(value)
        and (
            not math.isfinite(progress.best_value)
            or (value > progress.best_value if task.higher_is_better else value < progress.best_value)
        )
    )
    progress.num_worse = 0 if is_better else progress.num_worse + 1
    if is_better:
        progress.best_step, progress.best_value = progress.step, value
        run.write(BEST, {"step": progress.step, "valid": {name: _finite(one) for name, one in values.items()}})
    if log is not None:
        log.write({"step": progress.step, "valid_loss": evaluated.loss}
                  | {f"valid_{name}": one for name, one in values.items()})  # fmt: skip
        log.say(f"step {progress.step:>6}/{run.num_steps}  validation loss {evaluated.loss:.4f}  {task.metric} "
                f"{value:.4f}{'  (best)' if is_better else ''}")  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _due(run: Run, interval: int) -> bool:
    return run.progress.step % interval == 0


def _open_log(run: Run) -> MetricsLog:
    """Write the run's configuration, open its log and say what runs."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(run.folder / "config.yaml") as stream:
        stream.write(config_to_yaml(run.config).encode())
    targets = RunLog(dir=str(run.folder), **asdict(run.config.log))
    log = MetricsLog(targets, run.progress.step, run.num_steps)
    for line in _described(run):
        log.say(line)
    return log


def _described(run: Run) -> list[str]:
    """Return the lines a run begins with."""
    config, encoder = run.config, run.encoder
    parameters = run.engine.model.parameters()  # of sharded ones DeepSpeed knows the number
    learning = sum(int(getattr(part, "ds_numel", part.numel())) for part in parameters if part.requires_grad)
    how = "padding-free" if encoder.is_padding_free else "in padded batches (its class has no attention interface)"
    lines = [
        f"task {run.task.name}, head {run.task.head_name(config.head)}: {len(run.train):,} {run.task.unit} to train "
        f"on, {len(run.valid):,} to validate on",
        f"encoder {config.model}: {encoder.num_layers} layers of {encoder.hidden_size}, run {how}; tuning "
        f"{config.tuning.mode}",
        f"{run.num_steps:,} steps of {config.train.batch_size} {run.task.unit} on {run.place.world_size} process(es) "
        f"({run.place.device.type}), {config.train.precision}, ZeRO {config.engine.zero_stage}; "
        f"{learning:,} weights learn",
    ]
    lines += run.task.notes([*run.train, *run.valid], encoder)
    if run.progress.step:
        lines.append(f"going on from step {run.progress.step}")
    return lines
