"""Settings of the task ``function``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SplitConfig:
    """How proteins and terms are split.

    Attributes:
        seed: Of what is drawn.
        identity: Proteins at least this alike from end to end stay together (0.4 to 1).
        valid_proteins: Share of the proteins that validation has.
        test_proteins: Share of the proteins that the test has.
        unseen_terms: Share, of each namespace's terms with enough positives, that is withheld for validation, and again
            for the test.
        least_positives: Positives a term needs, among the split's proteins and among the training ones, to be drawn.
        withhold_descendants: Whether the descendants of a withheld term are withheld too. They count in the share, so
            that specific terms are drawn.
    """

    seed: int = 0
    identity: float = 0.5
    valid_proteins: float = 0.1
    test_proteins: float = 0.1
    unseen_terms: float = 0.1
    least_positives: int = 10
    withhold_descendants: bool = False


@dataclass
class FunctionConfig:
    """Text tower, term vectors, blocks and loss. The fusion is ``head.name``: dot, bilinear or concat.

    A step takes ``train.batch_size`` proteins and ``num_terms`` terms: few proteins and many functions, or the reverse.

    Attributes:
        template: Text of a term; ``{name}``, ``{definition}`` and ``{namespace}`` stand for what the ontology says.
        pooling: How residue states become a protein's vector: their mean, or a learned weighting.
        graph: How term vectors take from the ontology: not at all, a mixture with the mean of their ``ancestors``, or a
            ``layer`` that adds what the mean of their parents says.
        size: Of the vectors that are compared.
        num_terms: Terms of a step's block; each is scored with every protein of the step.
        positive_share: Share of the terms drawn among the positives of the block's proteins.
        sibling_share: Share drawn among the siblings of these; the others are drawn among all seen terms.
        frequency_power: Terms are drawn with their number of training proteins to this power as weight: 1 as they come,
            0 all alike.
        open_world: Whether what may be true but is not annotated counts as not known instead of negative.
        loss: ``bce`` on every cell of a block that is known; with ``contrastive`` also a protein's terms against the
            block's other terms, and a term's proteins against the other proteins (CLIP's, with several positives).
        text_tuning: Which of the text tower's weights learn; LoRA as ``tuning.lora_...`` says.
        quantize: Hold the frozen weights of both towers in 8 bits (LLM.int8) or 4 (NF4), by bitsandbytes.
        vectors: Folder in which vectors of frozen towers are kept from run to run; empty keeps them for one run.
        split: Which proteins and terms are trained on.
    """

    template: str = "{name}. {definition} ({namespace})"
    pooling: Literal["mean", "attention"] = "mean"
    graph: Literal["none", "ancestors", "layer"] = "layer"
    size: int = 256
    num_terms: int = 256
    positive_share: float = 0.5
    sibling_share: float = 0.25
    frequency_power: float = 0.5
    open_world: bool = True
    loss: Literal["bce", "contrastive"] = "bce"
    text_tuning: Literal["frozen", "lora", "full"] = "frozen"
    quantize: Literal["none", "8bit", "4bit"] = "none"
    vectors: str = ""
    split: SplitConfig = field(default_factory=SplitConfig)
