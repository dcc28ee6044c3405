"""Train a smaller protein encoder on the logits and hidden states of a bigger one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megaprot.common.errors import InputError
from megaprot.common.quiet import quiet
from megaprot.common.sequence_readers import Columns
from megaprot.finetune.config import EngineConfig, FinetuneConfig, LogConfig, OptimConfig, TrainConfig
from megaprot.finetune.config_distillation import LossConfig

if TYPE_CHECKING:  # imported when used: `megaprot distill --help` does without
    from megaprot.common.vocabulary import Vocabulary
    from megaprot.finetune.distillation import Distillation
    from megaprot.finetune.examples import Example
    from megaprot.finetune.processes import Place

STUDENT, BEGINNING = "student", "beginning"


@dataclass
class DistillConfig:
    """What ``megaprot distill`` can be told.

    Attributes:
        teacher: Hugging Face folder of the teacher, with its masked-language head.
        data: Sequences in any format, or the prefix of a corpus of ``megaprot preprocess``.
        output: Folder of the run; the student is its folder ``student``. A folder that holds a save goes on from it.
        layers: The student's layers; each begins as one of the teacher's.
        hidden_size: The student's width; 0 takes the teacher's. A narrower student begins with random weights.
        valid_share: Share of the sequences that are held out.
        max_residues: Most residues of a sequence that are read at once; a window of longer ones is drawn. 0: no limit.
        seed: Of random weights, order, masks and windows.
        columns: Columns of the sequences in a table.
        loss: What the student learns from.
        optim: Optimizer and learning rate.
        train: Length, batch, precision, intervals.
        engine: DeepSpeed.
        log: Loggers.
    """

    teacher: str
    data: str
    output: str
    layers: int
    hidden_size: int = 0
    valid_share: float = 0.02
    max_residues: int = 1022
    seed: int = 1
    columns: Columns = field(default_factory=Columns)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)


CONFIG = DistillConfig


def run(config: DistillConfig) -> None:
    """Distil as ``config`` says, on every process that ``torchrun`` started (one without it).

    Raises:
        InputError: Configuration, teacher or data are wrong.
        RunError: The run failed.
    """
    quiet("deepspeed")
    quiet("torch.distributed")
    from megaprot.common.stopping import StopRequest, leave_marker, remove_marker
    from megaprot.common.watched import watched
    from megaprot.finetune.checks import check_config
    from megaprot.finetune.model_folder import BEST, ENCODER
    from megaprot.finetune.processes import processes
    from megaprot.finetune.training import Run, check_resumption, train

    output = Path(config.output)
    _check(config)
    settings = _settings(config)
    check_config(settings)
    with watched(config.output), processes(config.engine.timeout_minutes) as place:
        task = _task(config, place)
        training, valid = _examples(config, task.teacher.vocabulary)
        _begin(config, task, place)
        check_resumption(settings, task, training)
        if place.is_main:
            remove_marker(output)
        result = train(Run(settings, task, training, valid, place), StopRequest())
        if not place.is_main:
            return
        if result.is_finished:
            _publish(output / BEST / ENCODER, output / STUDENT)
            said = f"perplexity {result.best_value:.4f} of held-out sequences"
            print(f"{output / STUDENT}: {config.layers} layers, {said}")
        elif result.was_stopped:
            leave_marker(output, result.num_steps)


def _check(config: DistillConfig) -> None:
    """Raise InputError for a value that no run can have."""
    if not 0 < config.valid_share < 1:
        raise InputError(f"--valid_share is {config.valid_share}; give a share above 0 and below 1.")
    if config.loss.temperature <= 0:
        raise InputError(f"--loss.temperature is {config.loss.temperature}; give a number above 0.")
    weights = [config.loss.logits_weight, config.loss.hidden_weight, config.loss.truth_weight]
    if min(weights) < 0 or not any(weights):
        raise InputError("--loss.logits_weight, hidden_weight and truth_weight are 0 or more, and one is above 0.")
    if config.max_residues < 0 or config.hidden_size < 0:
        raise InputError("--max_residues and --hidden_size are 0 or more.")


def _settings(config: DistillConfig) -> FinetuneConfig:
    """Return the run as the fine-tuning loop knows it."""
    return FinetuneConfig(
        task="distillation",
        model=str(Path(config.output) / BEGINNING),
        data=config.data,
        output=config.output,
        seed=config.seed,
        optim=config.optim,
        train=config.train,
        engine=config.engine,
        log=config.log,
    )


def _task(config: DistillConfig, place: Place) -> Distillation:
    """Return the task, the teacher on this process's device."""
    from megaprot.finetune.distillation import Distillation

    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    return Distillation(Path(config.teacher), config.loss, config.max_residues, place.device, precision)


def _begin(config: DistillConfig, task: Distillation, place: Place) -> None:
    """Write the student as it begins; where the folder holds a save, only see that it is of such a student.

    Raises:
        InputError: The teacher has no such student, or the save is of another.
    """
    import shutil

    from megaprot.finetune import saves
    from megaprot.finetune.distillation import make_student

    folder = Path(config.output) / BEGINNING
    if folder.is_dir() and saves.newest(Path(config.output) / "checkpoints") is not None:
        _check_begun(config, folder, task.teacher.hidden_size)
    elif place.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before its first save
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_student(Path(config.teacher), folder, config.layers, config.hidden_size, config.seed)
    place.barrier()


def _check_begun(config: DistillConfig, folder: Path, teacher_size: int) -> None:
    """Raise InputError where the student of a run has other layers or another width than are asked for."""
    begun = json.loads((folder / "config.json").read_text())
    wanted = {"layers": config.layers, "hidden_size": config.hidden_size or teacher_size}
    found = {"layers": begun["num_hidden_layers"], "hidden_size": begun["hidden_size"]}
    for name, value in wanted.items():
        if found[name] != value:
            raise InputError(f"{config.output} holds a run with --{name} {found[name]}, not {value}; go on with that "
                             "or name another --output.")  # fmt: skip


def _publish(source: Path, folder: Path) -> None:
    """Copy the best student to where it is looked for."""
    import shutil

    from megaprot.common.files import folder_written_whole

    shutil.rmtree(folder, ignore_errors=True)
    with folder_written_whole(folder) as partial:
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)


def _examples(config: DistillConfig, vocabulary: Vocabulary) -> tuple[list[Example], list[Example]]:
    """Return training and validation sequences, told apart by a draw for each that the seed does not change."""
    import numpy as np

    from megaprot.common.counter_random import key, keys

    examples = list(_read(config, vocabulary))
    draws = keys(key(int.from_bytes(b"distheld")), np.arange(len(examples), dtype=np.int64))
    held_out = set(np.argsort(draws)[: max(1, round(config.valid_share * len(examples)))].tolist())
    if len(held_out) >= len(examples):
        raise InputError(f"--data {config.data} holds {len(examples)} sequences; give more.")
    training = [one for one in examples if one.number not in held_out]
    return training, [one for one in examples if one.number in held_out]


def _read(config: DistillConfig, vocabulary: Vocabulary) -> Iterator[Example]:
    """Yield the sequences of a file, or of a corpus."""
    import numpy as np

    from megaprot.finetune.examples import Example, read_unlabelled
    from megaprot.finetune.residues import encode
    from megaprot.pretrain.corpus import Corpus, corpus_file

    prefix = Path(config.data)
    if prefix.is_file() or not corpus_file(prefix, ".idx").is_file():
        yield from read_unlabelled(prefix, vocabulary, config.columns)
        return
    corpus = Corpus.open(prefix)
    corpus.vocabulary.require_per_residue("a corpus as --data")
    letters = np.array([token if len(token) == 1 else "X" for token in corpus.vocabulary.tokens], dtype="S1")
    for number in range(corpus.num_sequences):
        residues = encode(vocabulary, letters[corpus.sequence(number)].tobytes())
        yield Example(number, number, str(number), residues, "", np.empty(0))
