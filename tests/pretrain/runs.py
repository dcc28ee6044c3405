"""Small real runs inside the test process, and what they leave behind: rows of numbers, saved tensors."""

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import checkpoint as torch_checkpoint

from megaprot.common.masking import MASK_TOKEN
from megaprot.common.metrics_log import read_metrics
from megaprot.common.packing import PackedRow
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.corpus import CorpusWriter
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.step import Tally
from megaprot.pretrain.training import Training, train
from megaprot.pretrain.validation import validate
from tests.pretrain.tiny import ESM, tiny_config

# What the clock and the machine decide: all else is the same in two runs that do the same.
MEASURED = {"residues_per_second", "tflops_per_device", "memory_gb", "seconds_left"}
Rows = list[dict[str, Any]]
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


def write_corpus(folder: Path, lengths: Sequence[int] = (), vocabulary: Vocabulary = ESM, seed: int = 1) -> Path:
    """Write corpora ``train`` (some 17 rows of 128 tokens, or of these lengths) and ``valid`` of random residues."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, spread in (("train", lengths or range(4, 64)), ("valid", range(5, 65, 3))):
        writer = CorpusWriter(folder / name, vocabulary)
        for length in spread:
            writer.add(generator.choice(np.array(vocabulary.replacements, dtype=np.uint8), length))
        writer.finish({})
    return folder


def small_config(corpus: Path, run: Path, **sections: dict[str, Any]) -> PretrainConfig:
    """The tiny run, smaller still: every step logged, validation and a checkpoint at each second one, all kept."""
    train = {"global_batch_rows": 8, "num_steps": 5, "log_interval": 1, "eval_interval": 2, "save_interval": 2}
    defaults: dict[str, dict[str, Any]] = {
        "model": SMALL,
        "data": {"path": str(corpus), "row_tokens": 128, "max_sequence_length": 80},
        "run": {"dir": str(run)},
        "train": train | {"keep_checkpoints": 0},
    }
    return tiny_config(**{name: defaults.get(name, {}) | sections.get(name, {}) for name in {*defaults, *sections}})


def begin(config: PretrainConfig, place: Place) -> Training:
    """The run as ``megaprot pretrain`` begins or resumes it in a world of one process."""
    return Training(config, validate(config, 1), place)


def run(training: Training) -> Rows:
    """Take the steps that are left and return all rows of the run; signal handlers are left as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        train(training)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return rows_of(Path(training.config.run.dir))


def rows_of(folder: Path) -> Rows:
    """The rows of a run without what was measured."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def replace_take_step(training: Any, take_step: Callable[..., Any]) -> None:
    """Let the run call ``take_step`` in place of its own."""
    training.take_step = take_step


def stop_at(training: Training, step: int) -> None:
    """Let the run receive SIGTERM so that it ends with ``step`` (2 or more) steps behind it."""
    take_step = training.take_step

    def take_step_and_signal(number: int, *arguments: Any) -> Any:
        if number == step - 2:  # ranks tell each other of signals at the beginning of the next step
            signal.raise_signal(signal.SIGTERM)
        return take_step(number, *arguments)

    replace_take_step(training, take_step_and_signal)


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a save by name, read with torch alone, in a single process and without a model."""
    reader = torch_checkpoint.FileSystemReader(checkpoint / "weights")
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def copy_checkpoint(source: Path, run: Path) -> Path:
    """Put one save into the folder of another run, which then goes on from it."""
    return Path(shutil.copytree(source, run / "checkpoints" / source.name))


def tally_by_hand(logits: NDArray[np.float32], row: PackedRow) -> Tally:
    """The sums over a row's masked positions, one position at a time; ``logits`` [used positions, vocabulary]."""
    loss = correct = mask_loss = mask_count = 0.0
    used = int((row.masked_kind > 0).sum())
    for scores, label, kind in zip(logits.astype(np.float64), row.labels[:used], row.masked_kind[:used], strict=True):
        surprise = float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label])
        loss += surprise
        correct += int(scores.argmax()) == label
        if kind == MASK_TOKEN:
            mask_loss += surprise
            mask_count += 1
    return Tally(loss, used, correct, mask_loss, mask_count)
