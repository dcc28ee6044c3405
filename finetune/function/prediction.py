"""Predict terms, or anything said in words, for any number of proteins, in memory that does not grow with them.

Proteins come in chunks; each chunk is scored with all terms a few proteins at a time, made consistent with the
ontology, and only the best of each protein are kept. Vectors of terms are made once for a model and a list of terms,
and stay in the model's folder.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaprot.common.errors import InputError
from megaprot.common.files import atomic_write, sha256_of
from megaprot.finetune.batching import BATCH_TOKENS, plan_batches
from megaprot.finetune.best_places import best_places
from megaprot.finetune.examples import Example
from megaprot.finetune.function.ontology import Ontology
from megaprot.finetune.function.term_texts import ONTOLOGY
from megaprot.finetune.function.two_towers import ProteinPart
from megaprot.finetune.hugging_face import fingerprint
from megaprot.finetune.model_folder import HEAD, FinetunedModel
from megaprot.finetune.processes import Place
from megaprot.finetune.protein_states import gather_proteins
from megaprot.finetune.task import Task

CHUNK = 512
"""Proteins held at once."""
_PAIRS = 1 << 21
"""Scores held at once: 8 MiB."""
CAFA_MOST_TERMS = 1500
_VECTORS = "term_vectors"


@dataclass(frozen=True)
class FunctionRequest:
    """What is asked of the proteins.

    Attributes:
        terms: File of GO ids, one a line; ``all`` for all of the ontology; empty for those of the training proteins.
        text: Functions in words, instead of terms.
        top: Terms of each protein, the likeliest first.
        cafa: Write CAFA's submission format: protein, term, score to three places; no header.
        max_tokens: Tokens of a batch; 0 takes the device's default.
    """

    terms: str = ""
    text: Sequence[str] = ()
    top: int = 20
    cafa: bool = False
    max_tokens: int = 0


@dataclass(frozen=True)
class Asked:
    """What proteins are scored with: terms, or texts.

    Attributes:
        terms: Numbers of the terms, ascending, int64; none with texts.
        texts: The texts.
        vectors: Of either, [num_asked, size].
    """

    terms: NDArray[np.int64]
    texts: tuple[str, ...]
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def only(self, places: NDArray[np.int64]) -> Asked:
        """Return some of it, in the order of ``places``."""
        if self.texts:
            return Asked(self.terms, tuple(self.texts[place] for place in places.tolist()), self.vectors[:0])
        return Asked(self.terms[places], (), self.vectors[:0])


def check_request(request: FunctionRequest) -> None:
    """Raise InputError for a request that cannot be met."""
    if request.terms and request.text:
        raise InputError("--terms and --text are both given; give one of them.")
    if request.text and request.cafa:
        raise InputError("--cafa wants GO terms, not --text; leave one out.")
    if any(not text.strip() for text in request.text):
        raise InputError("--text is empty; say a function in words.")
    if request.top < 1:
        raise InputError(f"--top is {request.top}; give 1 or more.")
    if request.cafa and request.top > CAFA_MOST_TERMS:
        raise InputError(f"--top is {request.top}; CAFA takes at most {CAFA_MOST_TERMS:,} terms of a protein.")


def predict(
    tuned: FinetunedModel, proteins: Iterator[Example], output: Path, request: FunctionRequest, place: Place
) -> int:
    """Write the predictions for proteins as a table; return how many proteins there were. All ranks call it.

    Raises:
        InputError: The request or a protein cannot be used.
    """
    check_request(request)
    asked = _asked(tuned, request)
    num_proteins = 0
    with atomic_write(output) if place.is_main else contextlib.nullcontext(io.BytesIO()) as stream:
        table = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        writer = csv.writer(table, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        if place.is_main and not request.cafa:
            writer.writerow(("identifier", *tuned.task.columns()))
        while group := list(itertools.islice(proteins, CHUNK * place.world_size)):
            own = group[place.rank * CHUNK : (place.rank + 1) * CHUNK]
            found = best_terms(tuned, own, asked, request)
            rows = [row for one, best in zip(own, found, strict=True) for row in _rows(tuned.task, one, *best, request)]
            for part in place.to_main(rows):
                writer.writerows(part)
            num_proteins += len(group)
        table.flush()
        table.detach()
    return num_proteins


def _rows(
    task: Task, protein: Example, asked: Asked, scores: NDArray[np.float32], request: FunctionRequest
) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one protein's best terms or texts."""
    if asked.texts:
        for text, score in zip(asked.texts, scores.tolist(), strict=True):
            yield protein.identifier, " ".join(text.split()), "", "", f"{score:.6g}", ""
        return
    for cells in task.rows(protein, {"terms": asked.terms, "scores": scores}):
        if not request.cafa:
            yield (protein.identifier, *cells)
        elif float(cells[3]) >= 0.0005:  # CAFA takes scores above 0, to three places
            yield protein.identifier, cells[0], f"{float(cells[3]):.3f}"


def best_terms(
    tuned: FinetunedModel, proteins: Sequence[Example], asked: Asked, request: FunctionRequest
) -> list[tuple[Asked, NDArray[np.float32]]]:
    """Return each protein's best terms or texts and their scores from 0 to 1, the likeliest first, ties in order.

    Args:
        tuned: The model.
        proteins: As many as are held at once.
        asked: What they are scored with.
        request: How many of them are kept.
    """
    model: Any = tuned.model
    task: Any = tuned.task
    if not proteins:
        return []
    found = []
    with torch.no_grad():
        of_proteins = model.head.project_proteins(_pooled(tuned, proteins, request.max_tokens))
        for some in of_proteins.split(max(1, _PAIRS // len(asked))):
            scores = torch.sigmoid(model.head.score(some, asked.vectors)).cpu().numpy()
            if not asked.texts:
                scores = task.ontology.make_consistent(scores, asked.terms)
            for row in scores:
                best = best_places(row, request.top)
                found.append((asked.only(best), row[best]))
    return found


def _pooled(tuned: FinetunedModel, proteins: Sequence[Example], max_tokens: int) -> Tensor:
    """Return the pooled vectors [num_proteins, hidden_size] of proteins, batched by length."""
    encoder, model = tuned.encoder, tuned.model
    lengths = [len(one.residues) + encoder.vocabulary.num_boundary_tokens for one in proteins]
    pooled = torch.empty(len(proteins), encoder.hidden_size, device=encoder.device)
    for batch in plan_batches(lengths, max_tokens or BATCH_TOKENS[encoder.device.type], encoder.is_padding_free):
        rows = gather_proteins(encoder.vocabulary, encoder.longest, [proteins[member].residues for member in batch])
        part = ProteinPart(rows, np.array([proteins[member].number for member in batch], dtype=np.int64))
        pooled[torch.tensor(batch, device=encoder.device)] = model(part.to(encoder.device))
    return pooled


def _asked(tuned: FinetunedModel, request: FunctionRequest) -> Asked:
    """Return the terms or texts asked for, with their vectors."""
    model: Any = tuned.model
    task: Any = tuned.task
    if request.text:
        texts = model.text.encode(list(request.text))
        for place in texts.cut:
            print(f"--text '{request.text[place][:40]}...' is longer than the {model.text.longest} tokens that the "
                  "text encoder takes: its end is left out", file=sys.stderr)  # fmt: skip
        return Asked(np.empty(0, dtype=np.int64), tuple(request.text), model.project_texts(texts))
    terms = _terms(task.ontology, task.num_training, request.terms)
    return Asked(terms, (), kept_vectors(tuned, terms, lambda: model.project_terms(terms)))


def _terms(ontology: Ontology, trained: dict[str, int], asked: str) -> NDArray[np.int64]:
    """Return the numbers of the terms asked for, ascending, each once; what stands for none is counted and reported.

    Roots, which all proteins have, only come where a file names them.
    """
    if asked == "all":
        return np.flatnonzero(~ontology.is_root).astype(np.int64)
    if not asked:
        numbers = ontology.resolve(trained).numbers
        return np.unique(numbers[~ontology.is_root[numbers]]).astype(np.int64)
    resolved = ontology.resolve(_read_terms(Path(asked)))
    for what, counts in (("obsolete", resolved.obsolete), ("unknown to the ontology", resolved.unknown)):
        if counts:
            print(f"{asked}: {counts.total():,} terms are {what} and left out, such as {min(counts)}", file=sys.stderr)
    if resolved.replaced:
        old, new = min(resolved.replaced.items())
        print(f"{asked}: {len(resolved.replaced):,} terms have another id now, such as {old}: {new}", file=sys.stderr)
    terms = np.unique(resolved.numbers[resolved.numbers >= 0]).astype(np.int64)
    if not len(terms):
        raise InputError(f"--terms {asked} names no term of the model's ontology; give one GO id a line.")
    return terms


def _read_terms(path: Path) -> list[str]:
    """Return the first word of each line; empty lines and comments (#) are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--terms {path} cannot be read ({type(error).__name__}); give a file of GO ids.") from None
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def kept_vectors(tuned: FinetunedModel, terms: NDArray[np.int64], make: Callable[[], Tensor]) -> Tensor:
    """Return the vectors [num_terms, size] of terms from the model's folder; made and kept there the first time.

    The file is named by a checksum of all they are made of: weights, ontology, settings and the terms themselves.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    path = tuned.folder / _VECTORS / f"{_key(tuned, terms)}.safetensors"
    head: Any = tuned.model.head
    like = next(iter(head.parameters()))
    if path.is_file():
        try:
            return load_file(path)["vectors"].to(like)
        except (SafetensorError, KeyError, OSError):
            print(f"{path} is damaged; its vectors are made again", file=sys.stderr)
    vectors = make()
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(save({"vectors": vectors.float().cpu().contiguous()}))
    except OSError as error:
        print(f"{path.parent} cannot be written ({error.strerror}): vectors of terms are not kept", file=sys.stderr)
    return vectors


def _key(tuned: FinetunedModel, terms: NDArray[np.int64]) -> str:
    """Return what the vectors of terms depend on, as a checksum."""
    task: Any = tuned.task
    digest = hashlib.sha256()
    parts = (
        sha256_of(tuned.folder / HEAD),
        fingerprint(task.text_model),
        sha256_of(tuned.folder / ONTOLOGY),
        str(task.settings),
        str(next(iter(tuned.model.parameters())).dtype),
    )
    digest.update("\n".join(parts).encode())
    digest.update(terms.tobytes())
    return digest.hexdigest()[:16]
