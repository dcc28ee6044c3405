"""What tasks on protein pairs share: reading, threshold and temperature, metrics, baselines, leakage, figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune import figures
from megaprot.finetune.config import FinetuneConfig, HeadConfig
from megaprot.finetune.config_ppi import PpiConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.metrics import Floats, Weighted
from megaprot.finetune.pairs.baselines import PairBaselines
from megaprot.finetune.pairs.files import PairExample, find_pairs, read_pairs
from megaprot.finetune.pairs.leakage import UNRECORDED, leakage_section, pretraining_exclusions
from megaprot.finetune.pairs.metrics import (
    DEFINITIONS,
    best_threshold,
    order_flips,
    pair_metrics,
    stratified,
    temperature,
)
from megaprot.finetune.pairs.proteins import counts_of, labels_of
from megaprot.finetune.pairs.report import baseline_section
from megaprot.finetune.report import Section
from megaprot.finetune.task import Outcome, Task


class PairTask(Task):
    """A task whose examples are pairs (:class:`megaprot.finetune.pairs.PairExample`).

    An outcome has ``logits`` float64: one, or one of each order of the two proteins; the score is their mean.

    Attributes:
        settings: The section ``ppi`` of the run.
        threshold: Logit from which on a pair is called binding; of the validation split.
        temperature: What logits are divided by for a probability; of the validation split.
        baselines: What the model is measured beside; None where a model does not say what it was trained on.
    """

    folder = "ppi"
    metric = "aupr"
    unit = "pairs"
    threshold, temperature = 0.0, 1.0
    pos_weight = 1.0
    settings: PpiConfig
    baselines: PairBaselines | None = None
    _baseline_settings: dict[str, tuple[float, float]]
    _training_data = ""
    _pretraining = UNRECORDED
    _vocabulary: Vocabulary
    _read: Path
    _train: Sequence[PairExample]

    def configure(self, config: FinetuneConfig) -> None:
        """Take the section ``ppi``, and where training data and encoder are, which the report names."""
        self.settings = config.ppi
        self._training_data = str(Path(config.data).absolute())
        self._pretraining = pretraining_exclusions(Path(config.model))

    def place_of(self, data: Path, split: str) -> str:
        """Return the file of a split."""
        return str(find_pairs(data, split))

    def read(self, data: Path, split: str, vocabulary: Vocabulary) -> list[PairExample]:
        """Return the pairs of a split."""
        vocabulary.require_per_residue(f"--task {self.name}")
        self._vocabulary, self._read = vocabulary, find_pairs(data, split).resolve()
        return read_pairs(data, split, vocabulary)

    def read_unlabelled(self, path: Path, vocabulary: Vocabulary, columns: Columns) -> list[Any]:
        """Raise InputError: pairs have flags of their own."""
        raise InputError(f"--input {path}: a model of {self.name} scores pairs; give --pairs or --all_vs_all instead.")

    def num_residues(self, example: PairExample) -> int:
        """Return the residues of both proteins."""
        return len(example.residues_first) + len(example.residues_second)

    def digest_of(self, example: PairExample) -> bytes:
        """Return both sequences and the label as bytes."""
        both = example.residues_first.tobytes() + b"\xff" + example.residues_second.tobytes()
        return both + bytes([example.label + 1])

    def notes(self, examples: Sequence[PairExample], encoder: Encoder) -> list[str]:
        """Return how many pairs bind."""
        share = float(labels_of(examples).mean())
        return [f"{share:.1%} of the pairs bind; pos_weight {self.pos_weight:.4g}"]

    def learn(self, examples: Sequence[PairExample], config: HeadConfig) -> None:
        """Take the training split, for the baselines, and the weight of its positives."""
        self._train = examples
        share = float(labels_of(examples).mean())
        if not 0 < share < 1:
            raise InputError(f"all pairs of the training split have the label {share:.0f}; add pairs of the other.")
        self.pos_weight = self.settings.pos_weight or (1 - share) / share

    def class_loss(self, logits: Tensor, examples: Sequence[PairExample]) -> Tensor:
        """Return the sum over pairs of the binary cross-entropy of ``logits`` [num_pairs], positives weighted."""
        labels = torch.from_numpy(labels_of(examples)).to(logits.device, torch.float32)
        weight = torch.tensor(self.pos_weight, device=logits.device)
        return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum", pos_weight=weight)

    def finish(self, examples: Sequence[PairExample], outcomes: Sequence[Outcome]) -> None:
        """Choose threshold and temperature on the validation split; fit the baselines the first time."""
        labels = labels_of(examples)
        self.threshold, self.temperature = _chosen(labels, _scores(outcomes))
        if self.baselines is None:
            self.baselines = PairBaselines.fit(self._train, examples, self._vocabulary)
            scores = self.baselines.scores(examples, self._vocabulary)
            self._baseline_settings = {name: _chosen(labels, values) for name, values in scores.items()}

    def state(self) -> dict[str, Any]:
        """Return threshold, temperature, baselines, and what the model was made with."""
        state: dict[str, Any] = {
            "settings": asdict(self.settings),
            "threshold": self.threshold,
            "temperature": self.temperature,
            "pos_weight": self.pos_weight,
            "training_data": self._training_data,
            "pretraining": self._pretraining,
        }
        if self.baselines is not None:
            state |= {"baselines": self.baselines.state(), "baseline_settings": self._baseline_settings}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        self.settings = PpiConfig(**state["settings"])
        self.threshold, self.temperature = float(state["threshold"]), float(state["temperature"])
        self.pos_weight = float(state["pos_weight"])
        self._training_data, self._pretraining = str(state["training_data"]), str(state["pretraining"])
        if "baselines" in state:
            self.baselines = PairBaselines.restored(state["baselines"])
            chosen = state["baseline_settings"].items()
            self._baseline_settings = {name: (float(threshold), float(scale)) for name, (threshold, scale) in chosen}

    def metrics(self, examples: Sequence[PairExample], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return ranking, decisions at the validation split's threshold, calibration; by degree where it is known."""
        labels, logits = labels_of(examples), _scores(outcomes)
        found = pair_metrics(labels, logits, self.threshold, self.temperature)
        if len(outcomes[0]["logits"]) == 2:
            orders = np.stack([outcome["logits"] for outcome in outcomes])
            found["order_flips"] = order_flips(orders[:, 0], orders[:, 1], self.threshold)
        if self.baselines is not None:
            degrees = counts_of(self.baselines.degree.degrees, examples).sum(axis=2).min(axis=1)
            found |= stratified(labels, logits, degrees)
        return found

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return DEFINITIONS

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the other protein and the probability."""
        return ("second", "probability")

    def rows(self, example: PairExample, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the other protein's name and the calibrated probability that the two bind."""
        yield example.second, f"{self.probability(outcome['logits'].mean()):.6f}"

    def probability(self, logits: Any) -> Any:
        """Return calibrated probabilities of logits, a number or an array."""
        return expit(logits / self.temperature)

    def figures(self, examples: Sequence[PairExample], outcomes: Sequence[Outcome]) -> list[tuple[str, Any]]:
        """Return the curves of precision and recall and of true and false positives, and the reliability diagram."""
        labels, logits = labels_of(examples), _scores(outcomes)
        if len(np.unique(labels)) < 2:
            return []
        scores = {"model": logits, **self._baseline_scores(examples)}
        return [
            ("Precision and recall, true and false positives", figures.ranking(labels, scores)),
            ("Reliability", figures.reliability(labels, expit(logits), self.probability(logits))),
        ]

    def sections(self, examples: Sequence[PairExample], outcomes: Sequence[Outcome]) -> list[Section]:
        """Return the baselines' metrics and the leakage report."""
        others: dict[str, Sequence[PairExample]] = {}
        absent: dict[str, str] = {}
        for split in ("train", "valid"):
            if not self._training_data:
                absent[split] = "the model does not say where it is"
                continue
            try:
                if find_pairs(Path(self._training_data), split).resolve() == self._read:
                    absent[split] = "it is what is measured"
                else:
                    others[split] = read_pairs(Path(self._training_data), split, self._vocabulary)
            except InputError as error:
                absent[split] = str(error).rstrip(".")
        return [self._baseline_section(examples, outcomes),
                leakage_section(examples, others, absent, self._pretraining)]  # fmt: skip

    def _baseline_scores(self, examples: Sequence[PairExample]) -> dict[str, Floats]:
        return {} if self.baselines is None else self.baselines.scores(examples, self._vocabulary)

    def _baseline_section(self, examples: Sequence[PairExample], outcomes: Sequence[Outcome]) -> Section:
        """Return the model beside the baselines, all with thresholds of the validation split."""
        labels = labels_of(examples)
        model = pair_metrics(labels, _scores(outcomes), self.threshold, self.temperature)
        baselines = {
            name: pair_metrics(labels, scores, *self._baseline_settings[name])
            for name, scores in self._baseline_scores(examples).items()
        }
        return baseline_section(model, baselines, len(examples))


def _scores(outcomes: Sequence[Outcome]) -> Floats:
    """Return each pair's logit, the mean over its orders [num_pairs]."""
    return np.array([outcome["logits"].mean() for outcome in outcomes])


def _chosen(labels: Floats, logits: Floats) -> tuple[float, float]:
    """Return threshold and temperature of a validation split."""
    return best_threshold(labels, logits), temperature(labels, logits)
