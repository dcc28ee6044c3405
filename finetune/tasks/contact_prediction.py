"""Contacts: which residues are closer than 8 Angstrom in the folded protein (ProteinNet, TAPE)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from megaprot.finetune import figures
from megaprot.finetune.config import HeadConfig
from megaprot.finetune.contact_heads import (
    AttentionContactHead,
    AttentionSum,
    CombinedContactHead,
    contact_head,
    split_maps,
)
from megaprot.finetune.contact_metrics import (
    MIN_SEPARATION,
    contact_labels,
    count_hits,
    definitions,
    precision_metrics,
)
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.examples import BadLabel, Example
from megaprot.finetune.metrics import Weighted
from megaprot.finetune.protein_states import Proteins, whole_states
from megaprot.finetune.task import Outcome, Task, TaskModel

_MOST_RANK = 128
"""More is no low rank; ``head.hidden_size`` gives less."""
_NUM_MAPS = 4
"""Proteins of a split whose maps the report shows."""


class ContactModel(TaskModel):
    """Encoder and contact head, which may listen to the attention while the encoder runs."""

    def forward(self, proteins: Proteins) -> Tensor:
        """Return symmetric logits [L, L] of each protein, flat: see :func:`split_maps`."""
        listener = self.head.attention if isinstance(self.head, CombinedContactHead) else self.head
        attention = AttentionSum(listener, proteins) if isinstance(listener, AttentionContactHead) else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            states = whole_states(self.encoder, proteins, attention.add if attention else None)
        logits: Tensor = self.head(proteins, states, attention)
        return logits


class ContactPrediction(Task):
    """Pairs of residues in contact; a label is the CA positions, and nan where a residue is not resolved [L, 3]."""

    name = "contact_prediction"
    folder = "proteinnet"
    heads = ("combined", "attention", "low_rank", "tape")
    metric = "precision_at_l5_min_sep_6"

    def label_of(self, record: dict[str, Any], num_residues: int) -> NDArray[Any]:
        """Return the positions, float32 [num_residues, 3]."""
        if "tertiary" not in record:
            raise BadLabel(f"has no label 'tertiary', only {', '.join(map(repr, list(record)[:8]))}")
        try:
            positions = np.asarray(record["tertiary"], dtype=np.float32)
            is_valid = np.asarray(record.get("valid_mask", np.ones(num_residues))).astype(bool)
        except (ValueError, TypeError):
            raise BadLabel("its 'tertiary' is no table of three numbers a residue") from None
        if positions.shape != (num_residues, 3) or is_valid.shape != (num_residues,):
            raise BadLabel(f"has {len(positions)} positions and {len(is_valid)} marks in 'valid_mask' for "
                           f"{num_residues} residues")  # fmt: skip
        if not np.isfinite(positions[is_valid]).all():
            raise BadLabel("a valid residue's position is not finite")
        positions = positions.copy()
        positions[~is_valid] = np.nan
        return positions

    @staticmethod
    def _maps(outputs: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        return split_maps(outputs, [len(example.residues) for example in examples])

    @staticmethod
    def _map(example: Example) -> NDArray[np.int64]:
        is_valid = np.isfinite(example.label[:, 0])
        return contact_labels(np.nan_to_num(example.label), is_valid)

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return a head of pairs."""
        name = self.head_name(config)
        rank = min(config.hidden_size, _MOST_RANK, encoder.hidden_size)
        return contact_head(name, encoder.hidden_size, encoder.num_layers, encoder.num_heads, rank, config.dropout)

    def build_model(self, encoder: Encoder, head: nn.Module, is_frozen: bool) -> nn.Module:
        """Return encoder and head as one module."""
        return ContactModel(encoder, head, is_frozen)

    def weight(self, example: Example) -> float:
        """Return the number of labelled entries of the symmetric map: both triangles, as in TAPE."""
        is_valid = np.isfinite(example.label[:, 0]).astype(np.float64)
        return 2.0 * sum(float(is_valid[apart:] @ is_valid[:-apart]) for apart in range(MIN_SEPARATION, len(is_valid)))

    def loss(self, outputs: Any, examples: Sequence[Example]) -> Tensor:
        """Return the sum of cross-entropies over labelled entries."""
        total = outputs.new_zeros(())
        for logits, example in zip(self._maps(outputs, examples), examples, strict=True):
            labels = torch.from_numpy(self._map(example)).to(logits.device)
            counts = labels >= 0
            total = total + functional.binary_cross_entropy_with_logits(
                logits[counts], labels[counts].float(), reduction="sum"
            )
        return total

    def outcomes(self, outputs: Any, examples: Sequence[Example]) -> list[Outcome]:
        """Return hits and picks by definition where there are labels, and the most probable pairs."""
        found = []
        for logits, example in zip(self._maps(outputs, examples), examples, strict=True):
            chances = logits.float().sigmoid().cpu().numpy()
            outcome: Outcome = _most_probable(chances)
            if example.label.size:
                outcome |= count_hits(chances, self._map(example))
                if example.number < _NUM_MAPS:
                    outcome["map"] = chances.astype(np.float16)
            found.append(outcome)
        return found

    def metrics(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return precisions by share and separation, and the variants others published."""
        names = definitions()
        counted = [name for name in names if not name.endswith("_micro")]
        return precision_metrics({name: np.stack([outcome[name] for outcome in outcomes]) for name in counted})

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return definitions()

    def columns(self) -> tuple[str, ...]:
        """Return the columns of a pair: residues counted from 1."""
        return ("i", "j", "probability")

    def rows(self, example: Example, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the L most probable pairs with j - i >= 6, most probable first."""
        for (first, second), chance in zip(outcome["pairs"], outcome["probabilities"], strict=True):
            yield str(first + 1), str(second + 1), f"{chance:.4f}"

    def figures(self, examples: Sequence[Example], outcomes: Sequence[Outcome]) -> list[tuple[str, Any]]:
        """Return true and predicted maps of a few proteins."""
        shown = [(example, outcome["map"]) for example, outcome in zip(examples, outcomes, strict=True)
                 if "map" in outcome]  # fmt: skip
        return [
            (f"Contacts of {example.identifier}", figures.contact_maps(self._map(example), chances))
            for example, chances in shown
        ]


def _most_probable(chances: NDArray[np.floating]) -> Outcome:
    """Return the L most probable pairs [num_pairs, 2] with j - i >= 6 and their probabilities."""
    first, second = np.triu_indices(len(chances), MIN_SEPARATION)
    values = chances[first, second]
    order = np.argsort(-values, kind="stable")[: len(chances)]
    return {"pairs": np.stack((first[order], second[order]), axis=1), "probabilities": values[order]}


TASK = ContactPrediction
