"""The ontology as texts: what the text tower reads of a term, tokens and vectors kept once they are made."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.files import atomic_write
from megaprot.finetune.function.ontology import NAMESPACES, Ontology
from megaprot.finetune.function.text_tower import Texts, TextTower
from megaprot.finetune.function.vector_cache import VectorCache

ONTOLOGY = "ontology.json.gz"
"""What the ontology is called in a model's folder."""
_ARRAYS = {"namespaces": np.int8, "parent_starts": np.int64, "parents": np.int32, "relations": np.int8}


def check_template(template: str) -> None:
    """Raise InputError for a template that cannot be filled, or that says nothing of a term."""
    try:
        filled = [template.format(name=word, definition=word, namespace="") for word in ("a", "b")]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"--function.template '{template}' cannot be filled ({error!r}): use {{name}}, {{definition}} "
                         "and {namespace}.") from None  # fmt: skip
    if filled[0] == filled[1]:
        raise InputError(f"--function.template '{template}' has neither {{name}} nor {{definition}}: name one.")


class TermTexts:
    """Texts, tokens and frozen vectors of an ontology's terms.

    Args:
        ontology: The terms.
        template: See ``FunctionConfig``.
        path_of: Names the file in which vectors of a frozen tower are kept, from what the terms are; None keeps none.
    """

    def __init__(
        self, ontology: Ontology, template: str, path_of: Callable[[Iterable[str]], Path | None] = lambda _: None
    ) -> None:
        self.ontology, self.template = ontology, template
        self._ids: dict[int, tuple[int, ...]] = {}
        self._cut: set[int] = set()
        said = (template, *ontology.terms, *ontology.names, *ontology.definitions)
        self.cache = VectorCache(len(ontology), path_of(said))

    @property
    def num_cut(self) -> int:
        """Terms whose text was longer than the tower takes, of those read so far."""
        return len(self._cut)

    def text(self, term: int) -> str:
        """Return the text of a term."""
        ontology = self.ontology
        return self.template.format(
            name=ontology.names[term],
            definition=ontology.definitions[term],
            namespace=NAMESPACES[ontology.namespaces[term]].replace("_", " "),
        )

    def tokens(self, terms: NDArray[np.int64], tower: TextTower) -> Texts:
        """Return terms as tokens."""
        new = [term for term in terms.tolist() if term not in self._ids]
        for start in range(0, len(new), 1024):
            some = new[start : start + 1024]
            found = tower.encode([self.text(term) for term in some])
            self._ids.update(zip(some, found.ids, strict=True))
            self._cut.update(some[place] for place in found.cut)
        return Texts(
            tuple(self._ids[term] for term in terms.tolist()),
            tuple(place for place, term in enumerate(terms.tolist()) if term in self._cut),
        )

    def vectors(self, terms: NDArray[np.int64], tower: TextTower, is_frozen: bool) -> Tensor:
        """Return the tower's vectors [num_terms, hidden_size] on its device, without gradients; kept if frozen."""
        if not is_frozen:
            return tower.vectors(self.tokens(terms, tower))
        found = self.cache.get(terms, lambda missing: tower.vectors(self.tokens(terms[missing], tower)))
        return found.to(tower.device)


def write_ontology(path: Path, ontology: Ontology) -> None:
    """Write an ontology as gzipped JSON, which is read much faster than OBO."""
    content: dict[str, Any] = {field.name: getattr(ontology, field.name) for field in fields(ontology)}
    content |= {name: content[name].tolist() for name in _ARRAYS} | {"obsolete": sorted(ontology.obsolete)}
    with atomic_write(path) as stream:
        stream.write(gzip.compress(json.dumps(content).encode(), 6, mtime=0))


def read_written_ontology(path: Path) -> Ontology:
    """Return what :func:`write_ontology` wrote; raises InputError where it is missing or damaged."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        content |= {name: np.array(content[name], dtype=dtype) for name, dtype in _ARRAYS.items()}
        content |= {name: tuple(content[name]) for name in ("terms", "names", "definitions")}
        content["obsolete"] = frozenset(content["obsolete"])
        return Ontology(**content)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"{path} is missing or damaged ({type(error).__name__}); train again.") from error
