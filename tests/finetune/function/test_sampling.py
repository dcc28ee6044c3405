"""Blocks of proteins x terms: labels, what is masked, what kinds of terms there are, and determinism."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.finetune.config_function import FunctionConfig, SplitConfig
from megaprot.finetune.function.annotations import FunctionData
from megaprot.finetune.function.sampling import Block, BlockSampler
from megaprot.finetune.function.splits import TRAIN, FunctionSplit, split_data
from tests.finetune.function.ontologies import Terms, function_data, naive_ancestors, ontology_of, random_terms
from tests.finetune.function.test_clusters import families
from tests.finetune.function.test_splits import drawn_data

CONFIG, SEED = FunctionConfig(num_terms=12), 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FunctionData:
    return drawn_data(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def split(data: FunctionData) -> FunctionSplit:
    return split_data(data, SplitConfig(identity=0.8, unseen_terms=0.2, least_positives=2))


def drawn(split: FunctionSplit, step: int) -> NDArray[np.int64]:
    """Ten training proteins of a step."""
    return np.sort(np.random.default_rng(step).choice(split.numbers_of(TRAIN), 10, replace=False))


def blocks(data: FunctionData, split: FunctionSplit, config: FunctionConfig, num_steps: int = 20) -> list[Block]:
    sampler = BlockSampler(data, split, config, SEED)
    return [sampler.block(drawn(split, step), step) for step in range(num_steps)]


def test_blocks_hold_training_proteins_and_seen_terms_with_their_labels(
    data: FunctionData, split: FunctionSplit
) -> None:
    labels = data.labels.toarray()
    for block in blocks(data, split, CONFIG):
        assert block.labels.shape == block.is_known.shape == (10, 12)
        assert (split.proteins[block.proteins] == TRAIN).all() and split.is_seen[block.terms].all()
        assert len(set(block.proteins)) == 10 and len(set(block.terms)) == 12
        assert (block.labels == labels[np.ix_(block.proteins, block.terms)]).all()
        assert block.is_known[block.labels].all()


def test_what_may_be_true_is_not_known(data: FunctionData, split: FunctionSplit) -> None:
    terms = random_terms(4, 60)
    names = data.ontology.terms
    shown = [set(np.flatnonzero(row)) for row in split.training_labels(data.labels).toarray()]
    for block in blocks(data, split, CONFIG, 5):
        for row, protein in enumerate(block.proteins):
            own = {names[term] for term in shown[protein]}
            leaves = {term for term in own if not any(term in naive_ancestors(terms, o) - {o} for o in own)}
            spaces = {terms[term][0] for term in own if terms[term][1]}
            for column, term in enumerate(block.terms):
                is_below = bool(naive_ancestors(terms, names[term]) & leaves)
                is_known = names[term] in own or (not is_below and terms[names[term]][0] in spaces)
                assert block.is_known[row, column] == is_known
    for block in blocks(data, split, replace(CONFIG, open_world=False), 2):
        assert block.is_known.all()


def test_the_same_step_gives_the_same_block_whatever_went_before(data: FunctionData, split: FunctionSplit) -> None:
    first, second = BlockSampler(data, split, CONFIG, SEED), BlockSampler(data, split, CONFIG, SEED)
    proteins = drawn(split, 3)
    expected = first.block(proteins, 3)
    for step in (9, 1, 3):
        found = second.block(drawn(split, step), step)
    assert (found.proteins == proteins).all() and (found.terms == expected.terms).all()
    assert (first.block(proteins, 4).terms != expected.terms).any()
    assert (BlockSampler(data, split, CONFIG, SEED + 1).block(proteins, 3).terms != expected.terms).any()


def tree_data(folder: Path) -> FunctionData:
    """A root, three branches and ten leaves on each; a protein for every leaf."""
    root = "GO:0000000"
    terms: Terms = {root: (0, {})} | {f"GO:{branch}000000": (0, {root: "is_a"}) for branch in (1, 2, 3)}
    leaves: Terms = {f"GO:{b}0000{n:02d}": (0, {f"GO:{b}000000": "is_a"}) for b in (1, 2, 3) for n in range(1, 11)}
    ontology = ontology_of(folder, terms | leaves)
    return function_data(ontology, [{leaf} for leaf in leaves], families(9, num_families=30)[::4])


EVERYTHING = SplitConfig(valid_proteins=0, test_proteins=0, unseen_terms=0)


def test_shares_of_positives_and_siblings_are_met(tmp_path: Path) -> None:
    data = tree_data(tmp_path)
    config = FunctionConfig(num_terms=8, positive_share=3 / 8, sibling_share=5 / 8)
    sampler = BlockSampler(data, split_data(data, EVERYTHING), config, SEED)
    for step in range(30):
        block = sampler.block(np.array([step]), step)
        positives = block.terms[block.labels[0]]
        siblings = {other for term in positives for other in data.ontology.siblings(int(term)).tolist()}
        assert len(positives) == 3  # leaf, branch and root
        assert set(block.terms[~block.labels[0]].tolist()) <= siblings
    few = BlockSampler(data, split_data(data, EVERYTHING), replace(config, positive_share=0.0, sibling_share=0.0), SEED)
    shares = [few.block(np.array([step]), step).labels.mean() for step in range(30)]
    assert np.mean(shares) < 0.25  # negatives by frequency alone


def test_terms_come_as_often_as_their_frequency_says(tmp_path: Path) -> None:
    terms: Terms = {"GO:0000000": (0, {})} | {f"GO:000000{n}": (0, {"GO:0000000": "is_a"}) for n in range(1, 5)}
    ontology = ontology_of(tmp_path, terms)
    sequences = families(9, num_families=20)[::4]
    annotations = [{"GO:0000001"} if place % 4 else {f"GO:000000{2 + place // 4 % 3}"} for place in range(20)]
    data = function_data(ontology, annotations, sequences)
    split = split_data(data, EVERYTHING)
    config = FunctionConfig(num_terms=1, positive_share=0, sibling_share=0, frequency_power=1)
    sampler = BlockSampler(data, split, config, SEED)
    counts = np.bincount([int(sampler.block(np.array([0]), step).terms[0]) for step in range(2000)], minlength=5)
    expected = data.labels.toarray().sum(axis=0)
    assert counts / 2000 == pytest.approx(expected / expected.sum(), abs=0.04)
    alike = BlockSampler(data, split, replace(config, frequency_power=0.0), SEED)
    counts = np.bincount([int(alike.block(np.array([0]), step).terms[0]) for step in range(2000)], minlength=5)
    assert counts / 2000 == pytest.approx(np.full(5, 0.2), abs=0.04)


def test_a_block_never_has_more_terms_than_are_seen(data: FunctionData, split: FunctionSplit) -> None:
    (block,) = blocks(data, split, replace(CONFIG, num_terms=1000), 1)
    assert (block.terms == np.flatnonzero(split.is_seen)).all()


@pytest.mark.parametrize("changes", [{"num_terms": 0}, {"positive_share": 0.8}, {"sibling_share": -0.1}])
def test_settings_out_of_range_are_refused(data: FunctionData, split: FunctionSplit, changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        BlockSampler(data, split, replace(CONFIG, **changes), SEED)  # type: ignore[arg-type]
