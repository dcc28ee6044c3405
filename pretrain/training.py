"""The training loop: one linear pass over the steps of a run, on every rank alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megaprot.common import heartbeat
from megaprot.common.config_yaml import config_to_yaml
from megaprot.common.errors import RunError
from megaprot.common.files import atomic_write
from megaprot.common.metrics_log import MetricsLog
from megaprot.common.packing import PackedRow
from megaprot.common.stopping import StopRequest, leave_marker, remove_marker
from megaprot.pretrain import checkpoint
from megaprot.pretrain.blend import Blend
from megaprot.pretrain.checkpoint import TrainingState
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.evaluation import add_tallies, evaluate_stream
from megaprot.pretrain.guard import reason_to_skip, remember
from megaprot.pretrain.loading import iterate_steps
from megaprot.pretrain.optimizer import apply_settings, build_optimizer, learning_rate, set_learning_rate
from megaprot.pretrain.parallel import Place, seed_dropout
from megaprot.pretrain.report import describe_run, interval_row, progress_line
from megaprot.pretrain.shared_folder import require_shared
from megaprot.pretrain.step import StepResult, Tally, accumulate_gradients, apply_gradients
from megaprot.pretrain.stragglers import Stragglers
from megaprot.pretrain.stream import StreamPosition, TrainingStream, ValidationStream
from megaprot.pretrain.validation import batch_rows_at, row_shape_of


@dataclass
class Interval:
    """What happened since the last log row; every number is the world's.

    Attributes:
        tally: Sums over masked positions of steps that were not skipped.
        residues: Real residues read.
        tokens: Tokens in sequences read.
        squared_lengths: Sum of squared sequence lengths read.
        masked: Masked positions predicted.
        started: Clock at the beginning, in seconds.
        num_steps: Steps taken.
    """

    tally: Tally = field(default_factory=Tally)
    residues: float = 0.0
    tokens: float = 0.0
    squared_lengths: float = 0.0
    masked: float = 0.0
    started: float = field(default_factory=lambda: time.perf_counter())
    num_steps: int = 0


def _measures(rows: list[PackedRow], place: Place) -> list[float]:
    """Return residues, tokens and squared lengths of this rank's rows, zeros where another rank counts them."""
    if place.tensor_rank or place.pipeline_rank:
        return [0.0, 0.0, 0.0]
    lengths = [row.cu_seqlens[: row.num_sequences + 1] for row in rows]
    tokens = sum(float(bounds[-1]) for bounds in lengths)
    squared = sum(float(((bounds[1:] - bounds[:-1]).astype(float) ** 2).sum()) for bounds in lengths)
    return [float(sum(row.num_residues for row in rows)), tokens, squared]


class Training:
    """A run in progress: model, optimizer, streams and what must be remembered.

    Args:
        config: The run, validated.
        blend: Training and validation corpora.
        place: Where this process stands.
    """

    def __init__(self, config: PretrainConfig, blend: Blend, place: Place) -> None:
        self.config, self.place, self.blend = config, place, blend
        self.stop = StopRequest()  # first of all: building and loading can take minutes
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        require_shared(Path(config.run.dir), place)
        self.stragglers = Stragglers(place)
        engine = transformer_config(config)
        self.chunks: list[DistributedDataParallel] = build_model(config, engine, blend.vocabulary, place)
        self.optimizer: MegatronOptimizer = build_optimizer(config.optim, config.train, config.parallel, self.chunks)
        engine.grad_scale_func = self.optimizer.scale_loss
        data = config.data
        shape = row_shape_of(data, config.parallel.tensor, config.train.fp8)
        self.stream = TrainingStream(
            blend.train, shape, config.run.seed, blend.weights, data.sampling == "clusters", data.plan_folder
        )
        self.validation = ValidationStream(blend.valid, shape, blend.weights, config.train.eval_rows, data.plan_folder)
        self.state = TrainingState(position=self.stream.start.to_dict(), data_fingerprint=blend.fingerprint)
        self.saved_step = -1
        self._pending: checkpoint.Save | None = None
        self._resume()

    def _resume(self) -> None:
        """Go on from the newest complete checkpoint of the run folder, if there is one."""
        newest = checkpoint.newest_complete(self.checkpoints)
        if newest is None:
            self._take_initial_weights()
            return
        heartbeat.mark("loading")
        checkpoint.load(newest, self.chunks, self.optimizer)
        apply_settings(self.optimizer, self.config.optim)
        self.state = checkpoint.read_state(newest)
        self.saved_step = self.state.step
        if self.place.is_main:
            print(f"resumed from {newest}", flush=True)

    def _take_initial_weights(self) -> None:
        """Begin with the weights of another checkpoint where the configuration names one."""
        named = self.config.run.initial_checkpoint
        if not named:
            return
        checkpoint.load(Path(named), self.chunks)
        self.optimizer.reload_model_params()  # its fp32 copies are those of the random weights
        if self.place.is_main:
            print(f"weights of {named}", flush=True)

    def steps(self) -> Iterator[tuple[int, list[PackedRow], StreamPosition]]:
        """Yield (step, this rank's rows, data position afterwards) for the steps still to take."""
        position = StreamPosition.from_dict(self.state.position)
        todo = range(self.state.step, self.config.train.num_steps)
        asked = time.perf_counter()
        heartbeat.mark("reading rows", self.state.step)
        for loaded in iterate_steps(
            self.stream,
            position,
            todo,
            lambda step: batch_rows_at(step, self.config.train),
            self.place.data_rank,
            self.place.data_size,
            self.config.data.num_workers,
        ):
            if not self.is_saving:  # its thread reads and writes beside the loaders
                self.stragglers.seconds_waited += time.perf_counter() - asked
            heartbeat.mark("training")
            yield loaded.step, loaded.rows, loaded.position_after
            asked = time.perf_counter()
            heartbeat.mark("reading rows", self.state.step)

    def take_step(self, step: int, rows: list[PackedRow], requests: list[float]) -> tuple[StepResult, str]:
        """Take optimizer step ``step`` on this rank's rows; return its result and why it was skipped, if it was."""
        train, state = self.config.train, self.state
        seed_dropout(self.config.run.seed, step, self.place)
        set_learning_rate(self.optimizer, learning_rate(step, self.config.optim, train.num_steps))
        result = accumulate_gradients(self.chunks, self.optimizer, rows, self.place, requests)
        reason = reason_to_skip(
            result.tally.mean_loss,
            result.grad_norm,
            state.recent_losses,
            state.recent_grad_norms,
            train.spike_window,
            train.spike_sigma,
        )
        # Skipped values too, so that a lasting change of level stops being a spike.
        for value, recent in (
            (result.tally.mean_loss, state.recent_losses),
            (result.grad_norm, state.recent_grad_norms),
        ):
            if math.isfinite(value):
                remember(value, recent, train.spike_window)
        if reason:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            return result, reason
        apply_gradients(self.optimizer, result.grad_norm, self.config.optim.clip_grad)
        state.skipped_in_a_row = 0
        return result, ""

    def validate(self) -> Tally:
        """Return the tally over the validation rows, the same on every rank."""
        heartbeat.mark("validating", self.state.step)
        return evaluate_stream(self.chunks, self.validation, self.config, self.place)

    def save(self, is_last: bool = False) -> None:
        """Write a checkpoint of the present step; with ``train.background_saves`` only begin to, unless it is the last.

        Finishes the one before. A second call at one step does nothing more.
        """
        self.finish_save()
        if self.saved_step == self.state.step:
            return
        heartbeat.mark("saving", self.state.step)
        for chunk in self.chunks if self.config.parallel.overlap_communication else ():
            if self.config.parallel.distributed_optimizer:
                chunk.start_param_sync(force_sync=True)  # else gathered only by the next forward pass
        in_background = self.config.train.background_saves and not is_last
        self._pending = checkpoint.Save(
            self.checkpoints, self.chunks, self.optimizer, self.state, self.config, self.blend.vocabulary, in_background
        )
        if not in_background:
            self.finish_save()

    @property
    def is_saving(self) -> bool:
        """Whether a save has been begun and not finished, the same on every rank."""
        return self._pending is not None

    @property
    def has_written(self) -> bool:
        """Whether this rank has written its part of a save that has been begun; all finish it when all have."""
        return self._pending is not None and self._pending.is_written

    def finish_save(self) -> None:
        """Finish the save that has been begun, if there is one, then drop the oldest ones; all ranks call it."""
        begun, self._pending = self._pending, None
        if begun is None:
            return
        heartbeat.mark("saving", self.state.step)
        begun.finish()
        self.saved_step = begun.step
        if self.place.is_main:
            checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints, self.saved_step)


def _stop_after_skips(training: Training, step: int, reason: str) -> None:
    """Raise RunError, on all ranks alike, once too many steps in a row were skipped."""
    state, train = training.state, training.config.train
    if state.skipped_in_a_row < train.max_skipped_steps:
        return
    training.finish_save()
    kept = (
        f"checkpoint step {training.saved_step} is kept" if training.saved_step >= 0 else "there is no checkpoint yet"
    )
    raise RunError(
        f"{state.skipped_in_a_row} steps in a row were skipped, the last at step {step} ({reason}); {kept}; lower "
        "optim.lr, lengthen optim.warmup_steps or look at the data."
    )


def _validate_and_log(training: Training, log: MetricsLog | None) -> None:
    tally = training.validate()
    if log is not None:
        row = {
            "step": training.state.step,
            "validation_loss": tally.mean_loss,
            "validation_perplexity": tally.perplexity,
            "validation_masked_accuracy": tally.accuracy,
            "validation_mask_perplexity": tally.mask_perplexity,
        }
        log.write(row)
        log.say(
            f"step {training.state.step:>7}  validation loss {tally.mean_loss:.4f}  perplexity {tally.perplexity:.3f}  "
            f"on mask tokens {tally.mask_perplexity:.3f}  accuracy {tally.accuracy:.3f}"
        )


def _lacks_validation(training: Training, log: MetricsLog | None) -> bool:
    """True on all ranks alike where the run resumed at a step whose validation a stop left out."""
    state, train = training.state, training.config.train
    if not state.step or not _due(state.step, train.eval_interval, train.num_steps):
        return False
    answer = [log is not None and not log.has(state.step, "validation_loss")]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _absorb(training: Training, interval: Interval, result: StepResult, skipped: str, position: StreamPosition) -> None:
    """Add one step's numbers to the interval and to what the run remembers."""
    state = training.state
    residues, tokens, squared = result.requests[-3:]
    state.consumed_rows += batch_rows_at(state.step, training.config.train)
    state.consumed_residues += round(residues)
    state.step += 1
    state.position = position.to_dict()
    interval.residues += residues
    interval.tokens += tokens
    interval.squared_lengths += squared
    interval.masked += result.tally.count
    interval.num_steps += 1
    if not skipped:
        interval.tally = add_tallies(interval.tally, result.tally)


def train(training: Training) -> None:
    """Run the steps that are left: step, log, validate, save; stop early when asked to.

    A signal (SIGTERM, SIGUSR1) ends the run after its step with a checkpoint and a ``REQUEUE`` marker in the run
    folder; ``train.max_minutes`` ends it with a checkpoint.
    """
    config, place, state = training.config, training.place, training.state
    run_folder, stop = Path(config.run.dir), training.stop
    log = None
    if place.is_main:
        run_folder.mkdir(parents=True, exist_ok=True)
        remove_marker(run_folder)
        with atomic_write(run_folder / "config.yaml") as stream:
            stream.write(config_to_yaml(config).encode())
        log = MetricsLog(config.run, state.step, config.train.num_steps)
        for line in describe_run(config, training.blend, training.stream, training.chunks, place):
            log.say(line)
        if state.step >= config.train.num_steps:
            log.say(f"the run has its {state.step} steps; raise train.num_steps to go on")
    if _lacks_validation(training, log):
        _validate_and_log(training, log)
    started, interval = time.monotonic(), Interval()
    preempted = out_of_time = False
    for step, rows, position in training.steps():
        late = config.train.max_minutes and time.monotonic() - started > 60.0 * config.train.max_minutes
        asked = [float(stop.is_made), float(bool(late) and place.is_main), float(training.has_written)]
        result, skipped = training.take_step(step, rows, [*asked, *_measures(rows, place)])
        _absorb(training, interval, result, skipped, position)
        preempted, out_of_time = result.requests[0] > 0, result.requests[1] > 0
        if result.requests[2] == place.world_size:
            interval.started += _seconds(training.finish_save)
        if skipped and log is not None:
            log.say(f"step {state.step:>7}  skipped: {skipped} ({state.skipped_steps} so far)")
        last = state.step == config.train.num_steps or preempted or out_of_time
        if state.step % config.train.log_interval == 0 or last:
            row = interval_row(config, training.blend.vocabulary.size, state, result, interval, place)
            slow = training.stragglers.look(time.perf_counter() - interval.started, training.is_saving)
            if log is not None:
                log.write(row)
                for line in (progress_line(row), *slow):
                    log.say(line)
            interval = Interval()
        if log is not None:
            log.advance(state.step)
        _stop_after_skips(training, step, skipped)
        if not (preempted or out_of_time) and _due(state.step, config.train.eval_interval, config.train.num_steps):
            interval.started += _seconds(lambda: _validate_and_log(training, log))
        if _due(state.step, config.train.save_interval, config.train.num_steps) or last:
            interval.started += _seconds(partial(training.save, last))
        if preempted or out_of_time:
            break
    if log is not None:
        if preempted:
            leave_marker(run_folder, state.step)
            log.say(f"asked to stop: saved at step {state.step}; start the same command again to go on")
        elif out_of_time:
            log.say(f"train.max_minutes reached: saved at step {state.step}; start the same command again to go on")
        log.close()


def _seconds(pause: Callable[[], None]) -> float:
    """Do something that is no training and return the seconds it took."""
    started = time.perf_counter()
    pause()
    return time.perf_counter() - started


def _due(step: int, interval: int, num_steps: int) -> bool:
    """True at every ``interval`` steps and at the end; an interval of 0 means only at the end."""
    return step == num_steps or bool(interval and step % interval == 0)
