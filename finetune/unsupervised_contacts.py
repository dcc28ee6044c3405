"""How well attention alone finds contacts: a sparse regression fitted on few proteins, as for ESM (Rao et al. 2021).

The encoder learns nothing. Each pair of residues with j - i >= 6 has one feature a head and layer, its attention made
symmetric and less the average product; a logistic regression with an L1 penalty on 20 proteins (C = 0.15) weighs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.finetune.contact_metrics import MIN_SEPARATION, contact_labels, count_hits, precision_metrics
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.examples import Example
from megaprot.finetune.metrics import Metric, with_intervals
from megaprot.finetune.protein_states import gather_proteins, whole_states

NUM_FITTED = 20
INVERSE_PENALTY = 0.15
_NUM_ITERATIONS = 1000


def attention_features(encoder: Encoder, residues: NDArray[np.integer]) -> Tensor:
    """Return what attention says of each pair of a protein, fp32 [L, L, layers * heads].

    A protein longer than the encoder reads at once is read in windows, averaged where they overlap.
    """
    proteins = gather_proteins(encoder.vocabulary, encoder.longest, [residues]).to(encoder.device)
    length, num_heads = len(residues), encoder.num_heads
    found = torch.zeros(length, length, encoder.num_layers * num_heads)
    seen = torch.zeros(length, length, 1)

    def add(layer: int, first: int, maps: Tensor) -> None:
        channels = slice(layer * num_heads, (layer + 1) * num_heads)
        for place, one in enumerate(maps.float().cpu(), start=first):
            start, num_read = proteins.cuts[place][1], proteins.num_read[place]
            window = slice(start, start + num_read)
            inner = one[:, 1 : 1 + num_read, 1 : 1 + num_read]
            symmetric = inner + inner.transpose(1, 2)
            sums = symmetric.sum(dim=2)
            average = sums[:, :, None] * sums[:, None, :] / sums.sum(dim=1)[:, None, None]
            found[window, window, channels] += (symmetric - average).permute(1, 2, 0)
            seen[window, window] += layer == 0

    with torch.no_grad():
        whole_states(encoder, proteins, add)
    return found / seen.clamp(min=1)


def fit_sparse(features: Tensor, labels: Tensor, inverse_penalty: float = INVERSE_PENALTY) -> tuple[Tensor, Tensor]:
    """Return weights [num_features] and bias [] that minimise |w| + C sum of logistic losses; the bias is free.

    Accelerated proximal gradient descent (FISTA, Beck & Teboulle 2009) on features brought to one scale.

    Args:
        features: [num_pairs, num_features].
        labels: 0 or 1 [num_pairs].
        inverse_penalty: C.
    """
    scale = float(features.std()) or 1.0  # of all together: the penalty stays the same for each, up to this factor
    inputs = torch.cat((features / scale, torch.ones(len(features), 1)), dim=1).double()
    penalty = torch.full((inputs.shape[1],), 1.0 / scale, dtype=torch.float64)
    penalty[-1] = 0.0
    step = 1.0 / (inverse_penalty * 0.25 * float(torch.linalg.matrix_norm(inputs.t() @ inputs, 2)))
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)
    weights[-1] = torch.logit(labels.double().mean().clamp(1e-6, 1 - 1e-6))
    ahead, momentum, targets = weights, 1.0, labels.double()
    for _ in range(_NUM_ITERATIONS):
        gradient = inverse_penalty * (inputs.t() @ ((inputs @ ahead).sigmoid() - targets))
        moved = ahead - step * gradient
        fresh = moved.sign() * (moved.abs() - step * penalty).clamp(min=0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = fresh + (momentum - 1) / following * (fresh - weights)
        weights, momentum = fresh, following
    return (weights[:-1] / scale).float(), weights[-1].float()


def unsupervised_precision(
    encoder: Encoder, fitted: Sequence[Example], measured: Sequence[Example], num_samples: int = 0
) -> dict[str, Metric]:
    """Return contact precisions on ``measured`` of a regression fitted on ``fitted``; labels are CA positions.

    Args:
        encoder: In evaluation mode.
        fitted: Proteins to fit on, :data:`NUM_FITTED` as a rule.
        measured: Proteins to measure on.
        num_samples: Bootstrap samples of the intervals; 0 for none.
    """
    features, labels = [], []
    for example in fitted:
        first, second = np.triu_indices(len(example.residues), MIN_SEPARATION)
        truths = _labels(example)[first, second]
        pairs = attention_features(encoder, example.residues)[first, second]
        features.append(pairs[truths >= 0])
        labels.append(torch.from_numpy(truths[truths >= 0]))
    weights, bias = fit_sparse(torch.cat(features), torch.cat(labels))
    counts: dict[str, list[NDArray[np.float64]]] = {}
    for example in measured:
        chances = (attention_features(encoder, example.residues) @ weights + bias).sigmoid().numpy()
        for name, count in count_hits(chances, _labels(example)).items():
            counts.setdefault(name, []).append(count)
    metrics = precision_metrics({name: np.stack(rows) for name, rows in counts.items()})
    return with_intervals(metrics, len(measured), num_samples)


def _labels(example: Example) -> NDArray[np.int64]:
    return contact_labels(np.nan_to_num(example.label), np.isfinite(example.label[:, 0]))
