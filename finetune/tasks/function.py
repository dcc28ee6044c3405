"""Protein function from text: a protein tower, a text tower, and the Gene Ontology between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import BadSequence, Vocabulary
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig, TuningConfig
from megaprot.finetune.config_function import FunctionConfig, SplitConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.function import function_metrics
from megaprot.finetune.function.annotations import FunctionData, read_function_data
from megaprot.finetune.function.function_metrics import FunctionScores, best_thresholds, cell_metrics
from megaprot.finetune.function.fusion import FUSIONS
from megaprot.finetune.function.losses import bce, contrastive
from megaprot.finetune.function.ontology import ASPECTS, Ontology
from megaprot.finetune.function.sampling import BlockSampler
from megaprot.finetune.function.source import Protein, Source
from megaprot.finetune.function.splits import SPLITS, TEST, TRAIN, VALID, split_data
from megaprot.finetune.function.term_graph import term_block
from megaprot.finetune.function.term_texts import (
    ONTOLOGY,
    TermTexts,
    check_template,
    read_written_ontology,
    write_ontology,
)
from megaprot.finetune.function.text_tower import TextTower, check_text_folder, load_text_tower
from megaprot.finetune.function.two_towers import (
    ProteinPart,
    Scores,
    ScoringPart,
    TextPart,
    TowersHead,
    TwoTowers,
    VectorBlock,
)
from megaprot.finetune.function.vector_cache import VectorCache, cache_path
from megaprot.finetune.gradient_caching import Block
from megaprot.finetune.hugging_face import fingerprint
from megaprot.finetune.metrics import Weighted
from megaprot.finetune.micro_batches import MicroBatch
from megaprot.finetune.protein_states import gather_proteins
from megaprot.finetune.quantization import quantize_frozen, require_bitsandbytes
from megaprot.finetune.report import Section
from megaprot.finetune.residues import encode
from megaprot.finetune.task import Outcome, Task
from megaprot.finetune.tuning import add_lora

TEXT_ENCODER = "text_encoder"
_SHOWN = ("pooled_auroc", "pooled_aupr", "pooled_f1", "pooled_precision", "pooled_recall", "macro_auroc", "macro_aupr",
          "macro_f1", "macro_precision", "macro_recall")  # fmt: skip


class Function(Task):
    """Which of the ontology's terms a protein has, the terms given as text."""

    name = folder = "function"
    heads = FUSIONS
    metric = "fmax"
    scores_terms = True

    def __init__(self, labels: LabelConfig) -> None:
        super().__init__(labels)
        self.settings = FunctionConfig()
        self.tuning = TuningConfig(mode="frozen")
        self.text_model = Path()
        self.is_training = False
        self.num_training: dict[str, int] = {}
        self.thresholds = dict.fromkeys(ASPECTS, 0.5)
        self.seed = 0
        self._source: Source | None = None
        self._texts: TermTexts | None = None
        self._tower: TextTower | None = None
        self._sampler: BlockSampler | None = None
        self._protein_cache: VectorCache | None = None
        self._kept: dict[str, list[str]] = {}

    # What is read, and how it is kept with the model.

    def configure(self, config: FinetuneConfig) -> None:
        """Take the settings; raises InputError for those that no run can have."""
        if not config.text_model:
            raise InputError("--text_model is missing: name the Hugging Face folder of a text encoder.")
        check_text_folder(Path(config.text_model))
        check_template(config.function.template)
        if config.function.size < 1:
            raise InputError(f"--function.size is {config.function.size}: give 1 or more.")
        if config.engine.zero_stage == 3:  # keeps a weight's old gradient where a step's first backward pass has none
            raise InputError("--engine.zero_stage 3: the task function trains its towers in turn; give 0, 1 or 2.")
        if config.function.quantize != "none":
            require_bitsandbytes("function.quantize")
            if config.tuning.mode not in ("frozen", "lora"):
                raise InputError("--function.quantize holds frozen weights in few bits: give --tuning.mode frozen or "
                                 "lora.")  # fmt: skip
        settings = config.function
        if Path(settings.vectors).is_file():
            raise InputError(f"--function.vectors {settings.vectors} is a file: name a folder.")
        if settings.vectors:  # the model names the folder, wherever it is used from
            settings = replace(settings, vectors=str(Path(settings.vectors).absolute()))
        kept: dict[str, list[str]] = {}
        how = [config.train.precision, settings.quantize]
        if config.tuning.mode == "frozen":
            kept["proteins"] = [fingerprint(Path(config.model)), *how]
        if settings.text_tuning == "frozen":
            kept["terms"] = [fingerprint(Path(config.text_model)), *how]
        text_model = Path(config.text_model)
        is_same = (kept, settings.template, text_model) == (self._kept, self.settings.template, self.text_model)
        if self._source is not None and self._source.split_config != settings.split:
            raise InputError("--sweep function.split: all runs of a grid read the same data; run them one by one.")
        self._kept = kept
        self.settings, self.tuning, self.is_training = settings, config.tuning, True
        self.seed = config.seed
        self.text_model = text_model
        if self._source is not None and not is_same:  # one of several runs on the same data, with other vectors
            self._begin_vectors(self._source.data)

    def place_of(self, data: Path, split: str) -> str:
        """Return what messages call a split; raises InputError where there is none of that name."""
        if split not in SPLITS:
            raise InputError(f"--split {split}: the splits of {data} are {', '.join(SPLITS)}.")
        return f"{data} (split '{split}')"

    def read(self, data: Path, split: str, vocabulary: Vocabulary) -> list[Any]:
        """Return the proteins of a split; of training ones the labels of unseen terms are taken away.

        Raises:
            InputError: The data cannot be used, or a protein.
        """
        number = SPLITS.index(split)
        source = self._opened(data)
        labels = source.data.labels
        if number == TRAIN:
            labels = source.training_labels
        found = []
        for protein in source.split.numbers_of(number).tolist():
            try:
                residues = encode(vocabulary, source.data.sequences[protein])
            except BadSequence as error:
                name = source.data.identifiers[protein]
                raise InputError(f"{data}: the sequence of {name} {error}; correct or remove it.") from None
            terms = labels.indices[labels.indptr[protein] : labels.indptr[protein + 1]].astype(np.int64)
            found.append(Protein(protein, source.data.identifiers[protein], residues, terms, number))
        if not found:  # of training there are always some
            raise InputError(f"{data}: the split '{split}' has no proteins: train with a larger "
                             f"--function.split.{split}_proteins.")  # fmt: skip
        return found

    def _opened(self, folder: Path) -> Source:
        """Return a data folder read and split; the ontology is from now on that of the data."""
        if self._source is None or self._source.folder != folder:
            data = read_function_data(folder)
            split = split_data(data, self.settings.split)
            self._source = Source(folder, self.settings.split, data, split)
            self._begin_vectors(data)
        return self._source

    def _begin_vectors(self, data: FunctionData) -> None:
        """Forget the vectors of frozen towers, or take those that were kept."""
        self._texts = TermTexts(data.ontology, self.settings.template, lambda said: self._path_of("terms", said))
        path = self._path_of("proteins", data.sequences)
        if self.is_training or path is not None:
            self._protein_cache = VectorCache(len(data), path)

    def _path_of(self, kind: str, read: Iterable[str | bytes]) -> Path | None:
        """Return the file in which a frozen tower's vectors of what it reads are kept; None where none are."""
        if kind not in self._kept:
            return None
        return cache_path(self.settings.vectors, kind, (*self._kept[kind], *read))

    @property
    def source(self) -> Source:
        """The data, once a split of them has been read."""
        assert self._source is not None
        return self._source

    @property
    def texts(self) -> TermTexts:
        """The ontology's terms as texts, once data or a model's folder have been read."""
        assert self._texts is not None
        return self._texts

    @property
    def ontology(self) -> Ontology:
        """The ontology of the data, or of the model's folder."""
        return self.texts.ontology

    def learn(self, examples: Sequence[Any], config: HeadConfig) -> None:
        """Take how many training proteins have each seen term."""
        counts = np.bincount(np.concatenate([one.terms for one in examples]), minlength=len(self.ontology))
        self.num_training = {self.ontology.terms[term]: int(counts[term]) for term in np.flatnonzero(counts).tolist()}

    def state(self) -> dict[str, Any]:
        """Return settings, terms trained on, thresholds, and what vectors of frozen towers were made of."""
        return {
            "settings": asdict(self.settings),
            "num_training": self.num_training,
            "thresholds": self.thresholds,
            "kept": self._kept,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        settings = dict(state["settings"])
        settings["split"] = SplitConfig(**settings["split"])
        self.settings = FunctionConfig(**settings)
        self.num_training = dict(state["num_training"])
        self.thresholds, self._kept = dict(state["thresholds"]), dict(state["kept"])

    def write_files(self, folder: Path) -> None:
        """Write the ontology."""
        write_ontology(folder / ONTOLOGY, self.ontology)

    def read_files(self, folder: Path) -> None:
        """Take the ontology; the text tower is read when the model is built."""
        self.text_model = folder / TEXT_ENCODER
        ontology = read_written_ontology(folder / ONTOLOGY)
        self._texts = TermTexts(ontology, self.settings.template, lambda said: self._path_of("terms", said))

    def further_encoders(self, model: Any) -> dict[str, tuple[Any, Path]]:
        """Return the text tower, which goes with the model whether it has changed or not."""
        return {TEXT_ENCODER: (model.text, self.text_model)}

    def notes(self, examples: Sequence[Any], encoder: Encoder) -> list[str]:
        """Return what was read and left out, how it was split, and which texts lost their end."""
        assert self._tower is not None
        lines = super().notes(examples, encoder)
        lines += [f"{what}: {count:,}" for what, count in self.source.data.counts.items() if count]
        terms = self.source.split.terms
        num_seen, num_valid, num_test = (int((terms == split).sum()) for split in (TRAIN, VALID, TEST))
        lines.append(f"terms: {num_seen:,} seen, {num_valid:,} unseen until validation, {num_test:,} until the test")
        self.texts.tokens(self.source.scored[VALID], self._tower)
        if self.texts.num_cut:
            lines.append(f"terms whose text is longer than the text encoder's {self._tower.longest:,} tokens and loses "
                         f"its end: {self.texts.num_cut:,}")  # fmt: skip
        return lines

    def digest_of(self, example: Any) -> bytes:
        """Return bytes of residues and labels."""
        digest: bytes = example.residues.tobytes() + example.terms.tobytes()
        return digest

    # The model.

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return pooling, projections, graph and fusion; opens the text tower, whose size they need."""
        self._tower = load_text_tower(self.text_model, device=encoder.device)
        return TowersHead(
            fusion=self.head_name(config),
            pooling=self.settings.pooling,
            graph=self.settings.graph,
            protein_size=encoder.hidden_size,
            text_size=self._tower.hidden_size,
            size=self.settings.size,
            hidden_size=config.hidden_size,
            dropout=config.dropout,
        )

    def build_model(self, encoder: Encoder, head: nn.Module, is_frozen: bool) -> nn.Module:
        """Return the two towers: for training as the settings say, for scoring both frozen."""
        tower, settings = self._tower, self.settings
        assert tower is not None
        assert isinstance(head, TowersHead)
        if self.is_training and settings.text_tuning == "lora":
            add_lora(tower.model, self.tuning)
        for name, parameter in tower.named_parameters():
            if "pooler" in name:  # never called
                parameter.requires_grad_(False)
        is_text_frozen = not self.is_training or settings.text_tuning == "frozen"
        model = TwoTowers(
            encoder, tower, head, is_frozen, is_text_frozen, lambda: self._protein_cache, lambda: self.texts
        )
        if settings.quantize != "none":
            quantize_frozen(encoder.model, settings.quantize)
            quantize_frozen(tower.model, settings.quantize)
        if self.is_training:
            self._sampler = BlockSampler(self.source.data, self.source.split, settings, self.seed)
        return model

    def _part(self, encoder: Encoder, proteins: Sequence[Protein]) -> ProteinPart:
        rows = gather_proteins(encoder.vocabulary, encoder.longest, [one.residues for one in proteins])
        return ProteinPart(rows, np.array([one.number for one in proteins], dtype=np.int64))

    def collate(self, encoder: Encoder, examples: Sequence[Any], seed: int | None) -> Any:
        """Return proteins of one split, to be scored with all terms that are scored there."""
        return ScoringPart(self._part(encoder, examples), self.source.scored[examples[0].split])

    def block(self, model: Any, examples: Sequence[Any], batches: Sequence[MicroBatch], seed: int) -> Block | None:
        """Return the step's proteins and the terms drawn for them; texts are read by micro-batches as proteins are."""
        assert self._sampler is not None
        is_blank = all(batch.is_blank for batch in batches)
        kept = [place for place, batch in enumerate(batches) if is_blank or not batch.is_blank]
        members = [examples[member] for place in kept for member in batches[place].members]
        sampled = self._sampler.block(np.array([one.number for one in members]), seed)
        terms = term_block(self.ontology, sampled.terms, self.settings.graph)
        device = model.encoder.device
        truth = [torch.from_numpy(one).to(device) for one in (sampled.labels, sampled.is_known)]
        parts: list[Any] = [self._part(model.encoder, [examples[one] for one in batch.members]) for batch in batches]
        learns = [not model.are_proteins_fixed] * len(parts)
        text_parts, vectors_of_texts = self._text_parts(model, terms.terms)

        def join(vectors: list[Tensor]) -> VectorBlock:
            proteins = torch.cat([vectors[place] for place in kept])
            return VectorBlock(proteins, vectors_of_texts(vectors[len(batches) :]), terms.to(device), *truth)

        return Block(parts + text_parts, learns + [True] * len(text_parts), join, members, is_blank)

    def _text_parts(
        self, model: Any, terms: NDArray[np.int64]
    ) -> tuple[list[TextPart], Callable[[list[Tensor]], Tensor]]:
        """Return the parts in which the texts of terms are read, and what makes one tensor of their vectors."""
        if model.is_text_frozen:
            kept = self.texts.vectors(terms, model.text, is_frozen=True)
            return [], lambda _: kept
        texts = self.texts.tokens(terms, model.text)
        batches = model.text.batches(texts)
        order = torch.tensor([member for batch in batches for member in batch], device=model.text.device)
        parts = [TextPart(model.text.pad([texts.ids[member] for member in batch])) for batch in batches]
        return parts, lambda vectors: torch.cat(vectors)[order.argsort()]

    def loss(self, outputs: Any, examples: Sequence[Any]) -> Tensor:
        """Return the sum over proteins of a block's loss; where split by split is scored, of cross-entropies."""
        scores: Scores = outputs
        if scores.truth is None:
            return bce(scores.logits, *self._truth(scores, examples)).sum()
        losses = bce(scores.logits, *scores.truth)
        if self.settings.loss == "contrastive":
            losses = losses + contrastive(scores.logits, *scores.truth)
        return losses.sum()

    def _truth(self, scores: Scores, examples: Sequence[Protein]) -> tuple[Tensor, Tensor]:
        """Return labels and which of them are known, bool [num_proteins, num_terms]."""
        numbers = np.array([one.number for one in examples], dtype=np.int64)
        labels = self.source.data.labels[numbers][:, scores.terms].toarray()
        is_known = np.ones_like(labels)
        if self.settings.open_world:
            is_known = labels | ~self.source.unknown.of(numbers, scores.terms)
        device = scores.logits.device
        return torch.from_numpy(labels).to(device), torch.from_numpy(is_known).to(device)

    # What comes out.

    def outcomes(self, outputs: Any, examples: Sequence[Any]) -> list[Outcome]:
        """Return each protein's scores from 0 to 1, consistent with the ontology, float32 [num_terms]."""
        scores = torch.sigmoid(outputs.logits.float()).cpu().numpy()
        return [{"scores": row} for row in self.ontology.make_consistent(scores, outputs.terms)]

    def joined(self, examples: Sequence[Any], outcomes: list[Outcome]) -> FunctionScores:
        """Return the scores of all proteins beside their labels."""
        numbers = np.array([one.number for one in examples], dtype=np.int64)
        scored = FunctionScores.empty(self.source.data, numbers, self.source.scored[examples[0].split])
        np.stack([outcome["scores"] for outcome in outcomes], out=scored.scores)
        return scored

    def finish(self, examples: Sequence[Any], outcomes: Any) -> None:
        """Take from which score on a term of each namespace counts as predicted: where F1 on seen terms is largest.

        Vectors of frozen towers are written, where they are kept.
        """
        for cache in (self.texts.cache, self._protein_cache):
            if cache is not None:
                cache.save()
        scored: FunctionScores = outcomes
        seen = np.flatnonzero(self.source.split.is_seen[scored.terms])
        of_seen = FunctionScores(
            scored.ontology, scored.terms[seen], scored.labels[:, seen], scored.in_namespace, scored.scores[:, seen]
        )
        found = best_thresholds(of_seen)
        self.thresholds = {aspect: min(threshold, 1.0) for aspect, threshold in found.items()}  # inf without positives

    def metrics(self, examples: Sequence[Any], outcomes: Any) -> dict[str, Weighted]:
        """Return CAFA's protein-centric figures, by namespace and their means."""
        centric = function_metrics.protein_centric(outcomes, self.source.content)
        found: dict[str, Weighted] = {}
        for name, of_namespace in (("fmax", centric.fmax), ("smin", centric.smin)):
            each = [of_namespace(namespace) for namespace in range(len(ASPECTS))]
            found[name] = lambda weights, each=each: _mean_of([metric(weights) for metric in each])  # type: ignore
            found |= {f"{name}_{aspect.lower()}": metric for aspect, metric in zip(ASPECTS, each, strict=True)}
        return found

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        found = {}
        for name in ("fmax", "smin"):
            text = function_metrics.definitions()[name]
            found[name] = f"{text}; mean over the namespaces that have proteins."
            found |= {f"{name}_{aspect.lower()}": f"{text}; {aspect} alone." for aspect in ASPECTS}
        return found

    def sections(self, examples: Sequence[Any], outcomes: Any) -> list[Section]:
        """Return the cells of the four-way grid that the split has: seen and unseen terms, by namespace."""
        scored: FunctionScores = outcomes
        is_seen = self.source.split.is_seen
        kind = "seen" if examples[0].split == TRAIN else "unseen"
        numbers = {}
        for name, wanted in (("seen", True), ("unseen", False)):
            columns = np.flatnonzero(is_seen[scored.terms] == wanted)
            cell = cell_metrics(scored, np.arange(len(examples)), columns, self.thresholds)
            numbers[f"{kind}_protein_{name}_term"] = cell
        rows = [
            [cell.replace("_", " "), namespace, *(f"{values[metric]:.3f}" for metric in _SHOWN)]
            for cell, of_namespace in numbers.items()
            for namespace, values in of_namespace.items()
        ]
        notes = [f"{name}: {text}." for name, text in function_metrics.definitions().items() if name in _SHOWN]
        plain = {
            cell: {
                namespace: {metric: value if np.isfinite(value) else None for metric, value in values.items()}
                for namespace, values in of_namespace.items()
            }
            for cell, of_namespace in numbers.items()
        }
        return [Section("grid", "Seen and unseen", ("cell", "namespace", *_SHOWN), rows, notes, plain)]

    def columns(self) -> tuple[str, ...]:
        """Return the columns of predicted terms."""
        return ("term", "name", "namespace", "score", "training_proteins")

    def rows(self, example: Any, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield the terms of ``outcome["terms"]`` with their ``outcome["scores"]``, in their order."""
        for term, score in zip(outcome["terms"].tolist(), outcome["scores"].tolist(), strict=True):
            identifier = self.ontology.terms[term]
            aspect = ASPECTS[self.ontology.namespaces[term]]
            num_training = self.num_training.get(identifier, 0)
            yield identifier, self.ontology.names[term], aspect, f"{score:.6g}", str(num_training)


def _mean_of(values: list[float]) -> float:
    """Return the mean of what is not nan; nan where all is."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


TASK = Function
