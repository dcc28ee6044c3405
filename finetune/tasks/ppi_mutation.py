"""What a mutation does to binding: score of (mutant, partner) minus that of (wild type, partner).

PLM-interact's mutation task (Liu et al. 2025), with windows around the mutation, so that none is cut off. A model of
the task ``ppi`` scores without training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor, nn

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.batch import num_pair_boundaries
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.pairs.cuts import residue_budget
from megaprot.finetune.pairs.files import find_pairs
from megaprot.finetune.pairs.inputs import PairInputs, Reading, gather_pairs
from megaprot.finetune.pairs.metrics import best_threshold, temperature
from megaprot.finetune.pairs.model import PairOutputs
from megaprot.finetune.pairs.mutations import (
    NO_LABEL,
    MutationExample,
    other_order,
    read_mutations,
    spans_of,
)
from megaprot.finetune.report import Section
from megaprot.finetune.task import Outcome
from megaprot.finetune.tasks.ppi import Ppi

_OF_DIFFERENCES = "is_of_differences"
"""In what was learned: threshold and temperature are those of differences, not of pairs."""
_WORDS = (
    "A pair here is a mutation with its partner; one that binds is one with label 1; its score is the mutant's logit "
    "minus the wild type's."
)


class PpiMutation(Ppi):
    """Loss on the difference of two logits, BCE with ``pos_weight``; an outcome's ``logits`` are differences.

    Where the encoder's folder belongs to a model of the task ``ppi``, training begins with its head.
    """

    name = "ppi_mutation"
    unit = "mutations"
    also_reads = ("ppi",)
    has_mlm_loss = False

    def __init__(self, labels: LabelConfig) -> None:
        super().__init__(labels)
        self._pair_model: Path | None = None

    def configure(self, config: FinetuneConfig) -> None:
        """Take the section ``ppi``, and find the pair model to begin with."""
        if config.ppi.long_pairs != "truncate":
            raise InputError("--ppi.long_pairs windows: mutations are read in the window around them; leave it out.")
        super().configure(config)
        self._pair_model = _pair_model_of(Path(config.model))

    def read(self, data: Path, split: str, vocabulary: Vocabulary) -> list[Any]:
        """Return the mutations of a split, all with labels."""
        path = find_pairs(data, split)
        examples = read_mutations(path, vocabulary)
        for example in examples:
            if example.label == NO_LABEL:
                raise InputError(f"{path}:{example.record}: has no label; give 0 or 1 in the column label.")
        return examples

    def read_unlabelled(self, path: Path, vocabulary: Vocabulary, columns: Columns) -> list[Any]:
        """Return the mutations of a table, whether or not it has labels."""
        return list(read_mutations(path, vocabulary))

    def num_residues(self, example: Any) -> int:
        """Return the residues of mutant and partner."""
        return int(example.num_residues)

    def digest_of(self, example: Any) -> bytes:
        """Return the three sequences and the label."""
        parts = (part.tobytes() for part in (example.wild, example.mutant, example.partner))
        return b"\xff".join(parts) + bytes([example.label + 1])

    def training_examples(self, examples: list[Any]) -> list[Any]:
        """Return every mutation with the partner second, and with the partner first."""
        return [*examples, *map(other_order, examples)]

    def num_tokens(self, example: MutationExample, encoder: Encoder) -> int:  # type: ignore[override]
        """Return the tokens that are read of wild type and mutant in one order."""
        wild, mutant, partner = spans_of(example, residue_budget(encoder, self.settings.max_length))
        num_residues = sum(end - start for start, end in (wild, mutant, partner, partner))
        return num_residues + 2 * num_pair_boundaries(encoder.vocabulary)

    def learn(self, examples: Sequence[Any], config: HeadConfig) -> None:
        """Take the weight of the positive mutations."""
        share = float(np.mean([example.label for example in examples]))
        if not 0 < share < 1:
            raise InputError(f"all mutations of the training split have the label {share:.0f}; add some of the other.")
        self.pos_weight = self.settings.pos_weight or (1 - share) / share

    def notes(self, examples: Sequence[Any], encoder: Encoder) -> list[str]:
        """Return how many mutations are read in windows, and where the head comes from."""
        budget = residue_budget(encoder, self.settings.max_length)
        originals = [one for one in examples if one.number >= 0]
        num_long = sum(0 < budget < one.num_residues for one in originals)
        lines = [f"pos_weight {self.pos_weight:.4g}"]
        if self._pair_model:
            lines.append(f"the head begins as that of {self._pair_model}")
        if num_long:
            lines.append(f"{num_long:,} of {len(originals):,} pairs are longer than the model reads: a window around "
                         "the mutation, the partner's end cut")  # fmt: skip
        return lines

    def collate(self, encoder: Encoder, examples: Sequence[Any], seed: int | None) -> PairInputs:
        """Return wild type and mutant of each, with its partner, in the example's order or in both."""
        budget = residue_budget(encoder, self.settings.max_length)
        both_orders = seed is None and self.settings.symmetric
        readings: list[Reading] = []
        left_out = []
        for example in examples:
            wild, mutant, partner = spans_of(example, budget)
            parts = [example.wild[slice(*wild)], example.mutant[slice(*mutant)]]
            beside = example.partner[slice(*partner)]
            for is_swapped in (False, True) if both_orders else (example.is_swapped,):
                for part in parts:
                    pair = (beside, part) if is_swapped else (part, beside)
                    readings.append(Reading(*pair, len(readings)))
            left_out.append(example.num_residues - len(parts[1]) - len(beside))
        return gather_pairs(encoder.vocabulary, readings, left_out)

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return the head that ``config`` names: the pair model's, where there is one of that name."""
        head = super().build_head(config, encoder)
        if self._pair_model is not None:
            try:
                head.load_state_dict(load_file(self._pair_model / "head.safetensors"))
            except RuntimeError as error:
                raise InputError(f"--head.hidden_size {config.hidden_size}: the head of {self._pair_model} has another "
                                 "size; give its.") from error  # fmt: skip
        return head

    def head_name(self, config: HeadConfig) -> str:
        """Return the head that ``config`` names, by default the pair model's; raises InputError for another."""
        if self._pair_model is None:
            return super().head_name(config)
        begun: str = json.loads((self._pair_model / "task.json").read_text(encoding="utf-8"))["head"]["name"]
        if config.name not in ("auto", begun):
            raise InputError(f"--head.name {config.name}: {self._pair_model} has the head {begun}; leave it out.")
        return begun

    def loss(self, outputs: PairOutputs, examples: Sequence[Any]) -> Tensor:
        """Return the sum of the losses of the differences of logits."""
        return self.class_loss(_differences(outputs[0]).mean(dim=1), examples).sum()

    def outcomes(self, outputs: PairOutputs, examples: Sequence[Any]) -> list[Outcome]:
        """Return the difference in each order, the logits of wild type and mutant, and the residues left out."""
        logits, _, left_out = outputs
        found = []
        for example_logits, count in zip(logits.cpu().double(), left_out.cpu().numpy(), strict=True):
            wild, mutant = example_logits.view(-1, 2).mean(dim=0).tolist()
            differences = _differences(example_logits.unsqueeze(0))[0].numpy()
            found.append({"logits": differences, "both": np.array([wild, mutant]), "left_out": count.reshape(1)})
        return found

    def finish(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> None:
        """Choose threshold and temperature on the validation split."""
        labels = np.array([float(example.label) for example in examples])
        logits = np.array([outcome["logits"].mean() for outcome in outcomes])
        self.threshold, self.temperature = best_threshold(labels, logits), temperature(labels, logits)

    def state(self) -> dict[str, Any]:
        """Return what was learned."""
        return {**super().state(), _OF_DIFFERENCES: True}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave; of a pair model neither threshold nor temperature, which are of pairs."""
        super().restore({name: value for name, value in state.items() if name != "baselines"})
        if _OF_DIFFERENCES not in state:
            self.threshold, self.temperature = 0.0, 1.0

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the score and its two parts."""
        return ("score", "logit_wild", "logit_mutant")

    def rows(self, example: Any, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the score and its two parts."""
        yield tuple(f"{value:.6g}" for value in (outcome["logits"].mean(), *outcome["both"]))

    def sections(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> list[Section]:
        """Return how the pairs were read, and what the words of pairs mean for mutations."""
        section = self.reading_section(outcomes)
        return [replace(section, notes=[*section.notes, _WORDS])]


def _differences(logits: Tensor) -> Tensor:
    """Return mutant minus wild type [num_examples, orders] of logits [num_examples, 2 * orders]."""
    return logits[:, 1::2] - logits[:, 0::2]


def _pair_model_of(encoder: Path) -> Path | None:
    """Return the folder of the pair model that an encoder's folder is, or is part of; None where there is none."""
    for folder in (encoder, encoder.absolute().parent):
        try:
            description = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if description.get("task") in ("ppi", "ppi_mutation") and (folder / "head.safetensors").is_file():
            return folder
    return None


TASK = PpiMutation
