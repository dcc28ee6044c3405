"""The methods: masked and wild-type marginals of variants (Meier et al. 2021), pseudo-perplexity of whole proteins."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import BadSequence, Vocabulary
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.residues import encode
from megaprot.tools.scoring.assays import Assay
from megaprot.tools.scoring.probabilities import log_probabilities


def mutated_positions(assay: Assay) -> list[int]:
    """Return the positions that any variant changes, ascending."""
    return sorted({mutation.position for variant in assay.variants for mutation in variant.mutations})


def marginal_scores(
    encoder: Encoder, assay: Assay, masked: bool, max_tokens: int, progress: Callable[[int], object]
) -> list[float]:
    """Return each variant's sum over its mutations of log p(mutant) - log p(wild type), given the wild type around it.

    Args:
        encoder: The model with its head.
        assay: Wild type and variants.
        masked: Read each position from a copy in which it is masked (masked marginals), else from the wild type as it
            stands (wild-type marginals, one pass).
        max_tokens: Budget of a batch; 0 takes that of the device.
        progress: Told the number of positions done.

    Raises:
        InputError: The model has no token for a letter.
    """
    letters = {letter: index for index, letter in enumerate(encoder.vocabulary.tokens) if len(letter) == 1}
    for variant in assay.variants:
        for mutation in variant.mutations:
            for letter in (mutation.wild_type, mutation.mutant):
                if letter not in letters:
                    raise InputError(f"{variant.place}: {mutation} has {letter}, which the model has no token for; "
                                     "leave the row out.")  # fmt: skip
    positions = mutated_positions(assay)
    residues = residue_ids(encoder.vocabulary, assay.sequence, assay.identifier)
    found = log_probabilities(encoder, residues, positions, masked, max_tokens, progress)
    rows = {position: row for row, position in enumerate(positions)}
    return [
        sum(
            float(found[rows[one.position], letters[one.mutant]] - found[rows[one.position], letters[one.wild_type]])
            for one in variant.mutations
        )
        for variant in assay.variants
    ]


def pseudo_perplexity(
    encoder: Encoder, sequence: str, name: str, max_tokens: int, progress: Callable[[int], object]
) -> float:
    """Return exp of minus the mean log probability of each residue where it alone is masked (Salazar et al. 2020)."""
    residues = residue_ids(encoder.vocabulary, sequence, name)
    found = log_probabilities(encoder, residues, range(len(residues)), True, max_tokens, progress)
    return math.exp(-float(found.gather(1, torch.tensor(residues.astype(np.int64))[:, None]).double().mean()))


def residue_ids(vocabulary: Vocabulary, sequence: str, name: str) -> NDArray[np.unsignedinteger]:
    """Return the ids of a protein's letters [num_residues]; raises InputError, naming it, where it has bad ones."""
    try:
        return encode(vocabulary, sequence.encode())
    except BadSequence as error:
        raise InputError(f"{name}: the sequence {error}; correct it or leave it out.") from None
