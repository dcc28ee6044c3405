"""Two towers and what joins them: proteins and texts in, one score a protein and term.

Each tower reads what it has to read once; only vectors meet. So a block of n proteins and m terms costs n + m passes,
and vectors of frozen towers are made once for a whole run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megaprot.finetune.batch import Batch
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.function.fusion import build_fusion
from megaprot.finetune.function.term_graph import TermBlock, TermGraph, term_block
from megaprot.finetune.function.term_texts import TermTexts
from megaprot.finetune.function.text_tower import TextBatch, Texts, TextTower
from megaprot.finetune.function.vector_cache import VectorCache
from megaprot.finetune.heads import AttentionPooling, MeanPooling
from megaprot.finetune.protein_states import Proteins, whole_states

_LEAST_SHARE = 0.01
"""Of a step in the running mean and spread; the first steps count alike."""
_LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class ProteinPart:
    """Proteins that are read at once.

    Attributes:
        proteins: Their residues.
        keys: Their rows in the cache of a frozen tower, int64 [num_proteins].
    """

    proteins: Proteins
    keys: NDArray[np.int64]

    def to(self, device: torch.device) -> ProteinPart:
        """Return the same on a device."""
        return ProteinPart(self.proteins.to(device), self.keys)


@dataclass(frozen=True)
class TextPart:
    """Texts of terms that are read at once.

    Attributes:
        batch: Their tokens.
    """

    batch: TextBatch

    def to(self, device: torch.device) -> TextPart:
        """Return the same on a device."""
        return TextPart(self.batch.to(device))


@dataclass(frozen=True)
class VectorBlock:
    """Vectors of both towers, to be scored with one another.

    Attributes:
        proteins: [num_proteins, encoder's hidden size].
        terms: [num_read, text tower's hidden size].
        block: Which terms they are.
        labels: Whether a protein has a term, bool [num_proteins, num_asked].
        is_known: Whether a label counts, of the same shape.
    """

    proteins: Tensor
    terms: Tensor
    block: TermBlock
    labels: Tensor
    is_known: Tensor


@dataclass(frozen=True)
class ScoringPart:
    """Proteins to be scored with terms whose vectors are kept from part to part.

    Attributes:
        part: The proteins.
        terms: Numbers of the terms, one and the same array for all parts.
    """

    part: ProteinPart
    terms: NDArray[np.int64]

    def to(self, device: torch.device) -> ScoringPart:
        """Return the same on a device."""
        return ScoringPart(self.part.to(device), self.terms)


@dataclass(frozen=True)
class Scores:
    """What a block comes to.

    Attributes:
        logits: fp32 [num_proteins, num_terms].
        terms: Numbers of the terms.
        truth: Labels and which of them count, bool [num_proteins, num_terms], of a training block.
    """

    logits: Tensor
    terms: NDArray[np.int64]
    truth: tuple[Tensor, Tensor] | None = None


class Standardize(nn.Module):
    """Vectors by feature less their mean over training, over their standard deviation.

    The vectors of a pretrained encoder have one large part in common, which hides what tells them apart. Mean and
    spread are running ones, updated by each training step's vectors before these are standardised by them, and fixed
    when scoring; no gradient goes through them.

    Args:
        size: Of the vectors.
    """

    mean: Tensor
    square: Tensor
    num_updates: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.ones(size))
        self.register_buffer("num_updates", torch.zeros(1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors [n, size] standardised."""
        if self.training:
            with torch.no_grad():
                share = max(1 / (float(self.num_updates) + 1), _LEAST_SHARE)
                self.mean += share * (vectors.float().mean(dim=0) - self.mean)
                self.square += share * (vectors.float().square().mean(dim=0) - self.square)
                self.num_updates += 1
        mean = self.mean.float()
        spread = (self.square.float() - mean.square()).clamp(min=_LEAST_VARIANCE).sqrt()
        return ((vectors.float() - mean) / spread).to(vectors.dtype)


class TowersHead(nn.Module):
    """All that learns beside the towers: pooling, projections, graph, fusion.

    Args:
        fusion: One of ``FUSIONS``.
        pooling: ``mean`` or ``attention``.
        graph: One of ``GRAPHS``.
        protein_size: Of the encoder's states.
        text_size: Of the text tower's vectors.
        size: Of the vectors that are compared.
        hidden_size: Of hidden layers.
        dropout: Of hidden layers.
    """

    def __init__(
        self,
        fusion: str,
        pooling: str,
        graph: str,
        protein_size: int,
        text_size: int,
        size: int,
        hidden_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pooling = MeanPooling() if pooling == "mean" else AttentionPooling(protein_size)
        is_sketch = fusion == "concat"
        self.protein = _projection(protein_size, size, hidden_size, dropout, is_sketch)
        self.text = _projection(text_size, size, hidden_size, dropout, is_sketch)
        self.graph = TermGraph(graph, size)
        self.fusion = build_fusion(fusion, size, hidden_size, dropout)

    def pool(self, batch: Batch, states: Tensor) -> Tensor:
        """Return fp32 [num_proteins, protein_size] of states [row_tokens, protein_size]; there is no padding to see."""
        pooled: Tensor = self.pooling(batch, states)
        return pooled.float()

    def project_proteins(self, vectors: Tensor) -> Tensor:
        """Return [n, size] of pooled vectors [n, protein_size]."""
        projected: Tensor = self.protein(vectors.to(_dtype_of(self)))
        return projected

    def project_terms(self, vectors: Tensor, block: TermBlock) -> Tensor:
        """Return [num_asked, size] of the text vectors [num_read, text_size] of a block."""
        projected: Tensor = self.graph(self.text(vectors.to(_dtype_of(self))), block)
        return projected

    def score(self, proteins: Tensor, terms: Tensor) -> Tensor:
        """Return logits fp32 [n, m] of projected vectors [n, size] and [m, size]."""
        logits: Tensor = self.fusion(proteins, terms)
        return logits.float()


def _projection(num_inputs: int, size: int, hidden_size: int, dropout: float, is_sketch: bool) -> nn.Module:
    """Return norms and what makes vectors that are compared: one layer with tanh, or two."""
    if is_sketch:
        return nn.Sequential(Standardize(num_inputs), nn.LayerNorm(num_inputs), nn.Linear(num_inputs, size), nn.Tanh())
    return nn.Sequential(
        Standardize(num_inputs),
        nn.LayerNorm(num_inputs),
        nn.Linear(num_inputs, hidden_size),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_size, size),
    )


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class TwoTowers(nn.Module):
    """Encoder, text tower and head as one module; what it gives depends on what it is called with.

    Args:
        encoder: Reads proteins.
        text: Reads terms.
        head: Joins them.
        is_frozen: Whether the encoder only reads.
        is_text_frozen: Whether the text tower only reads.
        protein_cache: Gives what keeps the vectors of a frozen encoder, where pooling learns nothing; None keeps none.
        term_texts: Gives the ontology's terms as texts.
    """

    def __init__(
        self,
        encoder: Encoder,
        text: TextTower,
        head: TowersHead,
        is_frozen: bool,
        is_text_frozen: bool,
        protein_cache: Callable[[], VectorCache | None],
        term_texts: Callable[[], TermTexts],
    ) -> None:
        super().__init__()
        self.encoder, self.text, self.head = encoder, text, head
        self.is_frozen, self.is_text_frozen = is_frozen, is_text_frozen
        self.protein_cache, self.term_texts = protein_cache, term_texts
        self._scored: tuple[NDArray[np.int64], Tensor] | None = None
        if is_frozen:
            encoder.requires_grad_(False)
        if is_text_frozen:
            text.requires_grad_(False)

    @property
    def are_proteins_fixed(self) -> bool:
        """Whether no gradient goes into what makes a protein's pooled vector."""
        return self.is_frozen and isinstance(self.head.pooling, MeanPooling)

    def train(self, mode: bool = True) -> TwoTowers:
        """Switch dropout on or off; a frozen tower has none."""
        super().train(mode)
        self._scored = None
        if self.is_frozen:
            self.encoder.eval()
        if self.is_text_frozen:
            self.text.eval()
        return self

    def forward(self, inputs: Any) -> Any:
        """Return pooled vectors of a ProteinPart, vectors of a TextPart, or Scores of a VectorBlock or ScoringPart."""
        if isinstance(inputs, ProteinPart):
            return self.protein_vectors(inputs)
        if isinstance(inputs, TextPart):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_text_frozen):
                return self.text(inputs.batch)
        if isinstance(inputs, ScoringPart):
            if self._scored is None or self._scored[0] is not inputs.terms:
                self._scored = (inputs.terms, self.project_terms(inputs.terms))
            proteins, terms = self.protein_vectors(inputs.part), self._scored[1]
            return Scores(self.head.score(self.head.project_proteins(proteins), terms), inputs.terms)
        assert isinstance(inputs, VectorBlock)
        terms = self.head.project_terms(inputs.terms, inputs.block)
        logits = self.head.score(self.head.project_proteins(inputs.proteins), terms)
        return Scores(logits, inputs.block.asked, (inputs.labels, inputs.is_known))

    def protein_vectors(self, part: ProteinPart) -> Tensor:
        """Return fp32 [num_proteins, hidden size]; of a frozen encoder from the cache, filled as proteins come."""
        cache = self.protein_cache()
        if not self.are_proteins_fixed or cache is None:
            return self._read(part.proteins)
        with torch.no_grad():
            # A part with a new protein is read whole: its proteins were mostly new together.
            found = cache.get(part.keys, lambda missing: self._read(part.proteins)[missing])
        return found.to(self.encoder.device)

    @torch.no_grad()
    def project_terms(self, terms: NDArray[np.int64]) -> Tensor:
        """Return the vectors [num_terms, size] of terms as proteins are compared with them, no gradients."""
        texts = self.term_texts()
        block = term_block(texts.ontology, terms, self.head.graph.graph)
        vectors = texts.vectors(block.terms, self.text, self.is_text_frozen)
        return self.head.project_terms(vectors, block.to(vectors.device))

    @torch.no_grad()
    def project_texts(self, texts: Texts) -> Tensor:
        """Return the vectors [num_texts, size] of free texts, which have no place in the graph, no gradients."""
        block = TermBlock(np.full(len(texts.ids), -1), len(texts.ids), torch.zeros(2, 0, dtype=torch.long))
        return self.head.project_terms(self.text.vectors(texts), block.to(self.text.device))

    def _read(self, proteins: Proteins) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            states = whole_states(self.encoder, proteins)
        return self.head.pool(proteins.whole, states)
