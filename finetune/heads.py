"""What stands on the encoder: heads for whole proteins and for residues, TAPE's own and ours.

Heads see the states of many proteins in one row (``megaprot.finetune.batch``). TAPE's (Rao et al. 2019) give what its
code gives for each protein alone; there a protein's last residues also see the padding of its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from megaprot.finetune.batch import Batch

TAPE_HIDDEN_SIZE = 512
_TAPE_KERNELS = (5, 3)
_GAP = max(_TAPE_KERNELS) // 2
"""Blank rows between proteins that keep convolutions inside them."""


class MeanPooling(nn.Module):
    """The mean of a protein's residue states."""

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """Return [num_proteins, hidden_size] of states [row_tokens, hidden_size]."""
        return batch.mean(states).to(states.dtype)


class AttentionPooling(nn.Module):
    """A learned weighting of a protein's residues: softmax over scores of a linear layer, begun as the plain mean."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """Return [num_proteins, hidden_size] of states [row_tokens, hidden_size]."""
        scores = self.score(states).float().squeeze(1).masked_fill(~batch.is_residue, float("-inf"))
        highest = scores.detach().new_full((batch.num_sequences,), float("-inf"))
        highest = highest.scatter_reduce(0, batch.sequence, scores.detach(), "amax")
        weights = (scores - highest[batch.sequence]).exp()
        sums = weights.new_zeros(batch.num_sequences).index_add(0, batch.sequence, weights)
        weighted = states.float() * (weights / sums[batch.sequence]).unsqueeze(1)
        pooled = weighted.new_zeros(batch.num_sequences, states.shape[1]).index_add(0, batch.sequence, weighted)
        return pooled.to(states.dtype)


class TapePooling(nn.Module):
    """BERT's pooler as TAPE has it: a linear layer and tanh on the first token's state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """Return [num_proteins, hidden_size] of states [row_tokens, hidden_size]."""
        return torch.tanh(self.dense(batch.first(states)))


class ProteinHead(nn.Module):
    """Outputs [num_proteins, num_outputs]: pooling, then a hidden layer.

    Args:
        pooling: From states to one vector a protein.
        layers: From there to the outputs.
    """

    def __init__(self, pooling: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.pooling, self.layers = pooling, layers

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """Return the outputs of states [row_tokens, hidden_size]."""
        outputs: Tensor = self.layers(self.pooling(batch, states))
        return outputs


class ResidueHead(nn.Module):
    """Outputs [num_residues of all proteins, num_outputs] by a hidden layer on each residue's state.

    Args:
        layers: From a state to the outputs.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """Return the outputs of states [row_tokens, hidden_size]."""
        outputs: Tensor = self.layers(states[batch.is_residue])
        return outputs


class ConvolutionHead(nn.Module):
    """Outputs a residue by two convolutions along the protein, blank rows keeping proteins apart.

    Args:
        norm: On states [row_tokens, hidden_size].
        first: Convolution to the hidden layer, kernel 5.
        activation: Of the hidden layer [row_tokens, size].
        second: Convolution to the outputs, kernel 3.
    """

    def __init__(self, norm: nn.Module, first: nn.Module, activation: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.norm, self.first, self.activation, self.second = norm, first, activation, second

    def forward(self, batch: Batch, states: Tensor) -> Tensor:
        """Return [num_residues of all proteins, num_outputs] of states [row_tokens, hidden_size]."""
        places = torch.arange(len(states), device=states.device) + _GAP * batch.sequence
        num_rows = len(states) + _GAP * (batch.num_sequences - 1)
        hidden = self.activation(self._along(self.first, self.norm(states), places, num_rows))
        return self._along(self.second, hidden, places, num_rows)[batch.is_residue]

    @staticmethod
    def _along(convolution: nn.Module, rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
        """Return a convolution's outputs [row_tokens, size] of rows set apart by blank ones."""
        spread = rows.new_zeros(num_rows, rows.shape[1]).index_copy(0, places, rows)
        outputs: Tensor = convolution(spread.t().unsqueeze(0)).squeeze(0).t()
        return outputs[places]


def _two_layers(num_inputs: int, hidden_size: int, num_outputs: int, dropout: float) -> nn.Sequential:
    """Return LayerNorm, a hidden layer with GELU and dropout, and the output layer."""
    return nn.Sequential(
        nn.LayerNorm(num_inputs),
        nn.Linear(num_inputs, hidden_size),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_size, num_outputs),
    )


def _tape_layers(num_inputs: int, num_outputs: int) -> nn.Sequential:
    """Return TAPE's ``SimpleMLP``: two layers with one norm for each whole weight, ReLU between."""
    return nn.Sequential(
        _normed(nn.Linear(num_inputs, TAPE_HIDDEN_SIZE)), nn.ReLU(), _normed(nn.Linear(TAPE_HIDDEN_SIZE, num_outputs))
    )


class _WholeNorm(nn.Module):
    """Makes a weight of one norm [1] and a direction, as :func:`_normed` says."""

    def forward(self, norm: Tensor, direction: Tensor) -> Tensor:
        """Return the weight."""
        return direction * (norm / direction.norm())

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm and direction of a weight."""
        return weight.norm().reshape(1), weight


def _normed(layer: nn.Module) -> nn.Module:
    """Return a layer with weight normalisation over the whole weight (Salimans & Kingma 2016), as in TAPE.

    torch's own holds the norm without dimensions, which DeepSpeed cannot send to other processes.
    """
    register_parametrization(layer, "weight", _WholeNorm())
    return layer


def protein_head(name: str, encoder_size: int, hidden_size: int, num_outputs: int, dropout: float) -> ProteinHead:
    """Return a head for whole proteins: ``mean``, ``attention`` or ``tape``."""
    if name == "tape":
        return ProteinHead(TapePooling(encoder_size), _tape_layers(encoder_size, num_outputs))
    pooling = MeanPooling() if name == "mean" else AttentionPooling(encoder_size)
    return ProteinHead(pooling, _two_layers(encoder_size, hidden_size, num_outputs, dropout))


def residue_head(name: str, encoder_size: int, hidden_size: int, num_outputs: int, dropout: float) -> nn.Module:
    """Return a head for residues: ``convolution``, ``mlp`` or ``tape``."""
    if name == "mlp":
        return ResidueHead(_two_layers(encoder_size, hidden_size, num_outputs, dropout))
    wide, narrow = _TAPE_KERNELS
    if name == "tape":
        return ConvolutionHead(
            nn.BatchNorm1d(encoder_size),
            _normed(nn.Conv1d(encoder_size, TAPE_HIDDEN_SIZE, wide, padding=wide // 2)),
            nn.ReLU(),
            _normed(nn.Conv1d(TAPE_HIDDEN_SIZE, num_outputs, narrow, padding=narrow // 2)),
        )
    return ConvolutionHead(
        nn.LayerNorm(encoder_size),
        nn.Conv1d(encoder_size, hidden_size, wide, padding=wide // 2),
        nn.Sequential(nn.GELU(), nn.Dropout(dropout)),
        nn.Conv1d(hidden_size, num_outputs, narrow, padding=narrow // 2),
    )
