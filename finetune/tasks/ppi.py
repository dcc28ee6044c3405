"""Protein-protein interaction by a cross-encoder that reads both proteins at once (PLM-interact, Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from megaprot.common.counter_random import key
from megaprot.common.errors import InputError
from megaprot.finetune.batch import num_pair_boundaries
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig
from megaprot.finetune.config_ppi import PpiConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.pairs.cuts import longest_first, residue_budget, window_pairs
from megaprot.finetune.pairs.files import PairExample, Residues
from megaprot.finetune.pairs.heads import PAIR_HEADS, pair_head
from megaprot.finetune.pairs.inputs import PairInputs, Reading, gather_pairs
from megaprot.finetune.pairs.model import PairOutputs, PpiModel
from megaprot.finetune.pairs.pair_task import PairTask
from megaprot.finetune.report import Section
from megaprot.finetune.task import Outcome

_LEAST_LENGTH = 16
_WINDOWS = int.from_bytes(b"window")
"""Sets the draws of windows apart from whatever else a seed is for."""


class Ppi(PairTask):
    """Joint loss in training, on masked residues; clean input and both orders in scoring.

    Attributes:
        has_mlm_loss: Whether training may mask residues.
        settings: The run's, or those the model was trained with.
        mask_rate: Share of residues masked in training.
    """

    name = "ppi"
    heads = PAIR_HEADS
    has_mlm_loss: ClassVar[bool] = True
    mask_rate = 0.0

    def __init__(self, labels: LabelConfig) -> None:
        super().__init__(labels)
        self.settings = PpiConfig()

    def configure(self, config: FinetuneConfig) -> None:
        """Take the section ``ppi``; raises InputError for a value that no run can have."""
        super().configure(config)
        self.settings = settings = config.ppi
        for name in ("mask_rate", "mlm_weight", "pos_weight"):
            if not getattr(settings, name) >= 0:
                raise InputError(f"--ppi.{name} is {getattr(settings, name)}; give 0 or more.")
        if not settings.class_weight > 0:
            raise InputError(f"--ppi.class_weight is {settings.class_weight}; give a number above 0.")
        if settings.max_length and settings.max_length < _LEAST_LENGTH:
            raise InputError(f"--ppi.max_length is {settings.max_length}; give {_LEAST_LENGTH} tokens or more, or 0 "
                             "for as many as the encoder takes.")  # fmt: skip
        if not self.has_mlm_loss:
            return
        if settings.mask_rate >= 1:
            raise InputError(f"--ppi.mask_rate is {settings.mask_rate}; give a share from 0 to below 1.")
        if settings.mlm_weight and not settings.mask_rate:
            raise InputError("--ppi.mask_rate 0 leaves nothing for the masked-language loss; give --ppi.mlm_weight 0 "
                             "as well.")  # fmt: skip
        if settings.mlm_weight and config.tuning.mode == "frozen":
            raise InputError("--tuning.mode frozen learns no masked-language model; give --ppi.mlm_weight 0 as well.")
        self.mask_rate, self.needs_lm_head = settings.mask_rate, settings.mlm_weight > 0

    def training_examples(self, examples: list[Any]) -> list[Any]:
        """Return every pair in both orders."""
        return [*examples, *map(swapped, examples)]

    def learn(self, examples: Sequence[Any], config: HeadConfig) -> None:
        """Take the training split, each pair once."""
        super().learn([one for one in examples if one.number >= 0], config)

    def num_tokens(self, example: PairExample, encoder: Encoder) -> int:
        """Return the tokens that are read of a pair in one order, all windows together."""
        spans = self._spans(encoder, len(example.residues_first), len(example.residues_second))
        boundaries = num_pair_boundaries(encoder.vocabulary)
        return sum(end - start + until - begin + boundaries for (start, end), (begin, until) in spans)

    def notes(self, examples: Sequence[Any], encoder: Encoder) -> list[str]:
        """Return how many pairs are cut or read in windows."""
        budget, lines = residue_budget(encoder, self.settings.max_length), list(super().notes(examples, encoder))
        pairs = [one for one in examples if one.number >= 0]
        num_long = sum(0 < budget < self.num_residues(one) for one in pairs)
        if not num_long:
            return lines
        tokens = budget + num_pair_boundaries(encoder.vocabulary)
        is_cut = self.settings.long_pairs == "truncate"
        how = "truncated, the longer protein first" if is_cut else "read in windows of both, joined"
        return [*lines, f"{num_long:,} of {len(pairs):,} pairs are longer than {tokens:,} tokens: {how}"]

    def collate(self, encoder: Encoder, examples: Sequence[Any], seed: int | None) -> PairInputs:
        """Return the pairs as one row: masked, one reading each, in training; both orders and all windows else."""
        readings: list[Reading] = []
        left_out = []
        num_orders = 2 if seed is None and self.settings.symmetric else 1
        for place, example in enumerate(examples):
            both = example.residues_first, example.residues_second
            for order, (first, second) in enumerate((both, both[::-1])[:num_orders]):
                spans = self._spans(encoder, len(first), len(second))
                if seed is not None and len(spans) > 1:
                    spans = [spans[int(key(seed, _WINDOWS, example.number)) % len(spans)]]
                score = num_orders * place + order
                readings += _readings(first, second, spans, score, example.number)
            is_whole = self.settings.long_pairs == "windows"
            left_out.append(0 if is_whole else _num_left_out(both, spans[0]))
        mask_rate = self.mask_rate if seed is not None else 0.0
        return gather_pairs(encoder.vocabulary, readings, left_out, mask_rate, seed or 0)

    def _spans(self, encoder: Encoder, num_first: int, num_second: int) -> list[tuple[tuple[int, int], ...]]:
        """Return the parts of two proteins that are read together."""
        budget = residue_budget(encoder, self.settings.max_length)
        if self.settings.long_pairs == "windows":
            return list(window_pairs(num_first, num_second, budget))
        first, second = longest_first(num_first, num_second, budget)
        return [((0, first), (0, second))]

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return the head that ``config`` names."""
        return pair_head(self.head_name(config), encoder.hidden_size, config.hidden_size, config.dropout)

    def build_model(self, encoder: Encoder, head: nn.Module, is_frozen: bool) -> PpiModel:
        """Return encoder and head; raises InputError where residues are to be masked that cannot."""
        if self.mask_rate and encoder.vocabulary.mask < 0:
            raise InputError("the encoder has no mask token; give --ppi.mask_rate 0 and --ppi.mlm_weight 0.")
        return PpiModel(encoder, head, is_frozen, self.needs_lm_head)

    def loss(self, outputs: PairOutputs, examples: Sequence[Any]) -> Tensor:
        """Return the weighted sum of both losses over the pairs."""
        logits, mlm_loss, _ = outputs
        class_loss = self.class_loss(logits.mean(dim=1), examples)
        return self.settings.class_weight * class_loss.sum() + self.settings.mlm_weight * mlm_loss.sum()

    def outcomes(self, outputs: PairOutputs, examples: Sequence[Any]) -> list[Outcome]:
        """Return the logits of each order, and the residues left out."""
        logits, _, left_out = outputs
        pairs = zip(logits.cpu().numpy().astype(np.float64), left_out.cpu().numpy(), strict=True)
        return [{"logits": values, "left_out": count.reshape(1)} for values, count in pairs]

    def state(self) -> dict[str, Any]:
        """Return what was learned, and the run's settings."""
        return {**super().state(), "settings": asdict(self.settings)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        super().restore(state)
        self.settings = PpiConfig(**state["settings"])

    def sections(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> list[Section]:
        """Return how the pairs were read, and what all tasks on pairs report."""
        return [self.reading_section(outcomes), *super().sections(examples, outcomes)]

    def reading_section(self, outcomes: Sequence[Outcome]) -> Section:
        """Return how many pairs were cut, and how many decisions depend on the order of the proteins."""
        left_out = [int(outcome["left_out"][0]) for outcome in outcomes]
        counts = {"num_truncated": sum(count > 0 for count in left_out), "residues_left_out": sum(left_out)}
        rows = [("truncated pairs", f"{counts['num_truncated']:,}"), ("residues left out", f"{sum(left_out):,}")]
        if len(outcomes[0]["logits"]) == 2:
            is_called = np.stack([outcome["logits"] for outcome in outcomes]) >= self.threshold
            counts["num_order_flips"] = int((is_called[:, 0] != is_called[:, 1]).sum())
            rows.append(("pairs decided otherwise in the other order", f"{counts['num_order_flips']:,}"))
        note = f"Of {len(outcomes):,} pairs; none was left out as a whole."
        return Section("reading", "How the pairs were read", ("", "number"), rows, [note], counts)


def swapped(example: PairExample) -> PairExample:
    """Return a pair in its other order, with a number below 0 that no other has."""
    return replace(
        example,
        number=-1 - example.number,
        first=example.second,
        second=example.first,
        residues_first=example.residues_second,
        residues_second=example.residues_first,
    )


def _readings(
    first: Residues, second: Residues, spans: Sequence[tuple[tuple[int, int], ...]], score: int, stream: int
) -> Iterator[Reading]:
    """Yield the readings of two proteins, one a pair of spans."""
    for (start, end), (begin, until) in spans:
        yield Reading(first[start:end], second[begin:until], score, stream)


def _num_left_out(both: tuple[Residues, Residues], spans: tuple[tuple[int, int], ...]) -> int:
    """Return how many residues of two proteins lie outside the spans."""
    return sum(map(len, both)) - sum(end - start for start, end in spans)


TASK = Ppi
