"""Encoder and pair head as one module: one pass gives the logits and the masked-language loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megaprot.finetune.encoder import Encoder
from megaprot.finetune.pairs.inputs import PairInputs
from megaprot.finetune.task import EncoderAndHead

PairOutputs = tuple[Tensor, Tensor, Tensor]
"""Logits fp32 [num_examples, scores an example], masked-language loss fp32 [num_readings] (mean over each reading's
masked residues; 0 when scoring), and residues left out int64 [num_examples]."""


class PpiModel(EncoderAndHead):
    """A cross-encoder: both proteins of a pair are read together (PLM-interact, Liu et al. 2025).

    PLM-interact runs the encoder twice over the same masked tokens, once for each loss; here both come of one pass,
    which gives the same gradients.

    Args:
        encoder: With its masked-language head where that loss is asked for.
        head: From a row of pairs and its states to logits [num_pairs].
        is_frozen: Whether the encoder only reads: no gradients, no dropout.
        has_mlm_loss: Whether the masked-language loss is computed, where tokens are masked.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, is_frozen: bool, has_mlm_loss: bool) -> None:
        super().__init__(encoder, head, is_frozen)
        self.has_mlm_loss = has_mlm_loss

    def forward(self, inputs: PairInputs) -> PairOutputs:
        """Return logits, masked-language loss and residues left out, for inputs on the model's device."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            (states,) = self.encoder(inputs.row)
        logits = joined(self.head(inputs.row, states).float(), inputs)
        return logits, self._mlm_loss(inputs, states), inputs.left_out

    def _mlm_loss(self, inputs: PairInputs, states: Tensor) -> Tensor:
        """Return the mean cross-entropy over the masked residues of each reading."""
        losses = torch.zeros(inputs.row.num_sequences, device=states.device)
        if not (self.has_mlm_loss and self.training):
            return losses
        if not len(inputs.masked):  # sharded weights are gathered by all processes or none, so the head is run
            return losses + 0.0 * self.encoder.logits(states[:1]).float().sum()
        logits = self.encoder.logits(states[inputs.masked]).float()
        owners = inputs.row.sequence[inputs.masked]
        sums = losses.index_add(0, owners, functional.cross_entropy(logits, inputs.truth, reduction="none"))
        return sums / losses.index_add(0, owners, torch.ones_like(sums[owners])).clamp(min=1)


def joined(logits: Tensor, inputs: PairInputs) -> Tensor:
    """Return the logits of readings as [num_examples, scores an example].

    A pair's windows are joined by the logarithm of the mean of their odds: between the mean, which hides one binding
    site among many windows, and the highest, which grows with their number.
    """
    if inputs.num_scores < len(logits):
        nothing = torch.zeros(inputs.num_scores, device=logits.device)
        counts = nothing.index_add(0, inputs.scores, torch.ones_like(logits))
        highest = nothing - torch.inf
        highest = highest.scatter_reduce(0, inputs.scores, logits.detach(), "amax")
        odds = nothing.index_add(0, inputs.scores, (logits - highest[inputs.scores]).exp())
        logits = highest + (odds / counts).log()
    return logits.view(len(inputs.left_out), -1)
