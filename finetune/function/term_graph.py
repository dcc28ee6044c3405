"""Term vectors refined over the ontology: what a term is, said by its parents or ancestors too.

An unseen term has seen ancestors, so the graph carries what was learned of them to it. ``ancestors`` smooths: a learned
share of a vector is the mean of the term's ancestors'. ``layer`` is one graph convolution over is_a and part_of
(GraphSAGE's mean aggregator, Hamilton et al. 2017) with a residual connection. Free text has no place in the graph: its
vector stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from megaprot.finetune.function.ontology import Ontology

GRAPHS = ("none", "ancestors", "layer")


@dataclass(frozen=True)
class TermBlock:
    """Terms, and the terms that refine them.

    Attributes:
        terms: Numbers of all terms that are read, those asked for first, int64 [num_read].
        num_asked: How many are asked for.
        edges: (place of a term asked for, place of one that refines it), int64 [2, num_edges].
    """

    terms: NDArray[np.int64]
    num_asked: int
    edges: Tensor

    @property
    def asked(self) -> NDArray[np.int64]:
        """Numbers of the terms asked for."""
        return self.terms[: self.num_asked]

    def to(self, device: torch.device) -> TermBlock:
        """Return the same with the edges on a device."""
        return TermBlock(self.terms, self.num_asked, self.edges.to(device))


def term_block(ontology: Ontology, terms: NDArray[np.int64], graph: str) -> TermBlock:
    """Return the block of some terms.

    Args:
        ontology: Terms and their parents.
        terms: Numbers of the terms, each once.
        graph: One of ``GRAPHS``: with ``ancestors`` all of them refine a term, with ``layer`` its parents.
    """
    terms = np.asarray(terms, dtype=np.int64)
    if graph == "none":
        return TermBlock(terms, len(terms), torch.zeros(2, 0, dtype=torch.long))
    starts, above = ontology.parent_starts, ontology.parents
    if graph == "ancestors":
        starts, above = ontology.ancestors.indptr, ontology.ancestors.indices
    counts = starts[terms + 1] - starts[terms]
    targets = np.repeat(np.arange(len(terms)), counts)
    within = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    sources = above[np.repeat(starts[terms], counts) + within].astype(np.int64)
    is_other = sources != terms[targets]  # a term is its own ancestor
    targets, sources = targets[is_other], sources[is_other]
    read = np.concatenate([terms, np.setdiff1d(sources, terms)])
    order = np.argsort(read)
    places = order[np.searchsorted(read, sources, sorter=order)]
    return TermBlock(read, len(terms), torch.from_numpy(np.stack([targets, places])))


class TermGraph(nn.Module):
    """Refines vectors of terms.

    Args:
        graph: One of ``GRAPHS``.
        size: Of the vectors.
    """

    def __init__(self, graph: str, size: int) -> None:
        super().__init__()
        self.graph = graph
        if graph == "ancestors":
            self.share = nn.Parameter(torch.zeros(1))
        if graph == "layer":
            self.norm = nn.LayerNorm(size)
            self.first = nn.Linear(size, size)
            self.last = nn.Linear(size, size, bias=False)

    def forward(self, vectors: Tensor, block: TermBlock) -> Tensor:
        """Return [num_asked, size] of the vectors [num_read, size] of all terms of a block."""
        own = vectors[: block.num_asked]
        if self.graph == "none":
            return own
        targets = block.edges[0]
        counts = torch.bincount(targets, minlength=len(own)).float()
        # As a sparse product, since the vectors of all edges would not fit for a whole ontology's ancestors.
        average = torch.sparse_coo_tensor(
            block.edges, 1 / counts[targets], (len(own), len(vectors)), check_invariants=False
        )
        mean = torch.sparse.mm(average, vectors.float()).to(own.dtype)
        has_any = (counts > 0).to(own.dtype).unsqueeze(1)  # roots and free text stay as they are
        if self.graph == "ancestors":
            return own + has_any * torch.sigmoid(self.share) * (mean - own)
        refined: Tensor = own + has_any * self.last(functional.gelu(self.first(self.norm(mean))))
        return refined
