"""What there is to score for ``megaprot predict``: the pairs of a file, or all pairs of one or two proteomes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import sha256_of
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.hugging_face import fingerprint
from megaprot.finetune.model_folder import ENCODER, HEAD, TASK, FinetunedModel
from megaprot.finetune.pairs.files import Pair, ProteinTable, Residues, iterate_pairs
from megaprot.finetune.pairs.pair_task import PairTask
from megaprot.finetune.pairs.scoring import PairScoring
from megaprot.finetune.pairs.screening import Screen, blocks_of, kept_of, lines_of

_MOST_LISTED = 1 << 17  # pairs of a part that come from a file


@dataclass(frozen=True)
class PairRequest:
    """What is to be predicted.

    Attributes:
        model: Folder of a run or of one of its models.
        output: Table to write.
        pairs: File of pairs; empty for all pairs.
        sequences: FASTA file of the proteins of ``pairs``; empty where that file holds the sequences.
        all_vs_all: FASTA file whose proteins are paired with each other, or two, the one's with the other's.
        top_k: Of all pairs keep so many partners of each protein of the first file; 0 any number.
        threshold: Of all pairs keep those of at least this probability; below 0 any.
        symmetric: Whether a model that reads both proteins together reads them in both orders.
        task: The task's Python file, if it is not one of those shipped.
        max_tokens: Tokens of a batch; 0 takes the device's default.
        precision: Type of the weights.
    """

    model: Path
    output: Path
    pairs: str = ""
    sequences: str = ""
    all_vs_all: tuple[str, ...] = ()
    top_k: int = 0
    threshold: float = -1.0
    symmetric: bool = True
    task: str = ""
    max_tokens: int = 0
    precision: str = "fp32"


def check_request(request: PairRequest) -> None:
    """Raise InputError for what cannot be asked for."""
    for name in (request.pairs, request.sequences, *request.all_vs_all):
        if name and not Path(name).is_file():
            raise InputError(f"{name} is no file; name one.")
    if request.pairs and request.all_vs_all:
        raise InputError("--pairs and --all_vs_all are two requests; give one of them.")
    if request.all_vs_all and request.sequences:
        raise InputError("--sequences are those of --pairs; --all_vs_all names FASTA files itself.")
    if not request.pairs and not request.all_vs_all:
        raise InputError("--sequences go with --pairs; name a file of pairs, or give --all_vs_all a FASTA file.")
    if request.pairs and not _holds_sequences(request) and not request.sequences:
        raise InputError(f"{request.pairs} only names proteins; give --sequences, a FASTA file that holds them.")
    if request.pairs and _holds_sequences(request) and request.sequences:
        raise InputError(f"{request.pairs} holds the sequences itself; leave --sequences out.")
    if len(request.all_vs_all) > 2:
        raise InputError(f"--all_vs_all names {len(request.all_vs_all)} files; give one or two.")
    if request.top_k < 0 or request.threshold > 1:
        raise InputError("--top_k is 0 or more, and --threshold at most 1.")
    is_limited = bool(request.top_k) or request.threshold >= 0
    if request.all_vs_all and not is_limited:
        raise InputError("--all_vs_all would write every pair; give --top_k, or --threshold (0 keeps all).")
    if request.pairs and is_limited:
        raise InputError("--top_k and --threshold are for --all_vs_all; of --pairs all are written.")


def _holds_sequences(request: PairRequest) -> bool:
    return ".csv" in Path(request.pairs).suffixes


class Job(ABC):
    """Pairs to score, cut into parts that are the same on any number of processes.

    Attributes:
        settings: What the scores depend on.
        proteins: Residue ids of all proteins.
        num_pairs: Pairs to score.
    """

    settings: dict[str, Any]
    proteins: list[Residues]
    num_pairs: int

    @abstractmethod
    def parts(self, scoring: PairScoring) -> Iterator[Any]:
        """Yield the parts in order."""

    @abstractmethod
    def size(self, part: Any) -> int:
        """Return how many pairs of a part are scored."""

    @abstractmethod
    def lines(self, scoring: PairScoring, part: Any) -> bytes:
        """Score a part and return its lines of the table."""


def open_job(request: PairRequest, tuned: FinetunedModel) -> Job:
    """Return what is asked for, with its proteins read.

    Raises:
        InputError: The model is of another kind, or the input cannot be used.
    """
    if not isinstance(tuned.task, PairTask) or tuned.task.unit != "pairs":
        raise InputError(f"{request.model} predicts {tuned.task.name}, not whether pairs bind; name another --model.")
    tuned.encoder.vocabulary.require_per_residue(f"--model {request.model}")
    tuned.task.settings = replace(tuned.task.settings, symmetric=request.symmetric)
    return ListJob(request, tuned) if request.pairs else ScreenJob(request, tuned)


def _settings(request: PairRequest, tuned: FinetunedModel) -> dict[str, Any]:
    """Return what the scores depend on: a run goes on only where it is the same."""
    files = [name for name in (request.pairs, request.sequences, *request.all_vs_all) if name]
    return {
        "task_sha256": sha256_of(tuned.folder / TASK),
        "head_sha256": sha256_of(tuned.folder / HEAD),
        "encoder_sha256": fingerprint(tuned.folder / tuned.description.get("encoder", ENCODER)),
        "input_sha256": [sha256_of(Path(name)) for name in files],
        **{name: getattr(request, name) for name in ("top_k", "threshold", "symmetric", "precision")},
    }


class ListJob(Job):
    """The pairs of a file, all of them, in its order."""

    def __init__(self, request: PairRequest, tuned: FinetunedModel) -> None:
        self.path, self.settings = Path(request.pairs), _settings(request, tuned)
        assert isinstance(tuned.task, PairTask)
        self._probability = tuned.task.probability
        vocabulary = tuned.encoder.vocabulary
        if _holds_sequences(request):
            table = ProteinTable(vocabulary, request.pairs)
        else:
            table = ProteinTable.read(Path(request.sequences), vocabulary)
        self._numbers: dict[str, int] = {}
        self.num_pairs = 0
        for pair in iterate_pairs(self.path, table if _holds_sequences(request) else None):
            for name in (pair.first, pair.second):
                if name not in self._numbers:
                    table.require(name, f"{self.path}:{pair.line}")
                    self._numbers[name] = len(self._numbers)
            self.num_pairs += 1
        self.proteins = [table[name] for name in self._numbers]

    def parts(self, scoring: PairScoring) -> Iterator[list[Pair]]:
        """Yield the pairs."""
        pairs, size = iterate_pairs(self.path), min(scoring.pairs_a_part, _MOST_LISTED)
        while part := list(islice(pairs, size)):
            yield part

    def size(self, part: list[Pair]) -> int:
        """Return how many they are."""
        return len(part)

    def lines(self, scoring: PairScoring, part: list[Pair]) -> bytes:
        """Return a line for each pair."""
        places = np.array([(self._numbers[pair.first], self._numbers[pair.second]) for pair in part], dtype=np.int64)
        logits = scoring.pairs(places)
        if not np.isfinite(logits).all():
            raise RunError("the model gives scores that are not finite; check its weights.")
        chances = self._probability(logits).tolist()
        lines = (f"{one.first}\t{one.second}\t{chance:.5g}\n" for one, chance in zip(part, chances, strict=True))
        return "".join(lines).encode()


class ScreenJob(Job):
    """All pairs of one or two FASTA files."""

    def __init__(self, request: PairRequest, tuned: FinetunedModel) -> None:
        self.settings = _settings(request, tuned)
        assert isinstance(tuned.task, PairTask)
        self._temperature = tuned.task.temperature
        tables = [_read(Path(name), tuned.encoder.vocabulary) for name in request.all_vs_all]
        self.names = [list(table) for table in tables]
        self.proteins = [residues for table in tables for residues in table.values()]
        self.screen = Screen(
            num_rows=len(tables[0]),
            num_columns=len(tables[-1]),
            is_one_set=len(tables) == 1,
            top_k=request.top_k,
            least_logit=_logit(request.threshold) * self._temperature,
        )
        self.num_pairs = self.screen.num_pairs

    def parts(self, scoring: PairScoring) -> Iterator[range]:
        """Yield blocks of rows."""
        yield from blocks_of(self.screen, scoring.pairs_a_part)

    def size(self, part: range) -> int:
        """Return how many pairs the rows are in."""
        if self.screen.is_triangle:
            return sum(self.screen.num_columns - row - 1 for row in part)
        return len(part) * (self.screen.num_columns - self.screen.is_one_set)

    def lines(self, scoring: PairScoring, part: range) -> bytes:
        """Return a line for each pair that is kept."""
        return lines_of(kept_of(scoring, self.screen, part), self.names[0], self.names[-1], self._temperature)


def _read(path: Path, vocabulary: Vocabulary) -> ProteinTable:
    table = ProteinTable.read(path, vocabulary)
    if not len(table):
        raise InputError(f"{path} holds no protein; name a FASTA file.")
    return table


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
