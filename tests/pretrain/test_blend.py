"""Blends of corpora: their shares, their epochs, restarts, and what cannot be blended."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.blend import folders_and_weights, open_blend
from megaprot.pretrain.config import DataConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.loading import iterate_steps, iterate_validation
from megaprot.pretrain.stream import StreamPosition, TrainingStream, ValidationStream
from tests.pretrain.runs import write_corpus
from tests.pretrain.test_stream import SHAPE, row_key

WEIGHTS = (3.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("blend")
    return write_corpus(folder / "a", range(4, 90)), write_corpus(folder / "b", range(8, 60, 2), seed=2)


@pytest.fixture(scope="module")
def corpora(folders: tuple[Path, Path]) -> list[Corpus]:
    return [Corpus.open(folder / "train") for folder in folders]


def stream_of(corpora: list[Corpus]) -> TrainingStream:
    return TrainingStream(corpora, SHAPE, 5, WEIGHTS)


def test_corpora_give_their_shares_of_the_rows_in_an_order_without_pattern(corpora: list[Corpus]) -> None:
    stream = stream_of(corpora)
    places = stream.rows_of_step(stream.start, 4000, 0, 1)
    first = np.array([corpus == 0 for corpus, _, _ in places])
    assert abs(first.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / np.sqrt(4000)


def test_each_corpus_is_read_epoch_after_epoch(corpora: list[Corpus]) -> None:
    stream = stream_of(corpora)
    places = stream.rows_of_step(stream.start, 400, 0, 1)
    for corpus in range(2):
        read = [(epoch, row) for number, epoch, row in places if number == corpus]
        expected = [(epoch, row) for epoch in range(100) for row in range(stream.num_rows(epoch, corpus))]
        assert read == expected[: len(read)]
        assert read[-1][0] > 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_and_restarts_change_nothing(corpora: list[Corpus], size: int) -> None:
    stream = stream_of(corpora)
    expected = stream.rows_of_step(stream.start, 48, 0, 1)
    at, found = stream.start, []
    for _ in range(6):
        ranks = [stream.rows_of_step(at, 8, rank, size) for rank in range(size)]
        found += [ranks[row % size][row // size] for row in range(8)]
        at = StreamPosition.from_dict(stream_of(corpora).advance(at, 8).to_dict())
    assert found == expected


def test_rows_are_those_of_their_corpus(corpora: list[Corpus]) -> None:
    stream = stream_of(corpora)
    [step] = iterate_steps(stream, stream.start, [0], lambda step: 12, 0, 1, 0)
    places = stream.rows_of_step(stream.start, 12, 0, 1)
    assert {corpus for corpus, _, _ in places} == {0, 1}
    assert [row_key(row) for row in step.rows] == [row_key(stream.row(epoch, row, at)) for at, epoch, row in places]


def test_corpora_of_one_content_are_masked_apart(corpora: list[Corpus]) -> None:
    stream = TrainingStream([corpora[0], corpora[0]], SHAPE, 5, (1.0, 1.0))
    assert row_key(stream.row(0, 0, 0)) != row_key(stream.row(0, 0, 1))


def test_validation_reads_all_corpora_or_their_shares_of_a_limit(folders: tuple[Path, Path]) -> None:
    corpora = [Corpus.open(folder / "valid") for folder in folders]
    each = [ValidationStream([corpus], SHAPE).num_rows for corpus in corpora]
    whole = ValidationStream(corpora, SHAPE, WEIGHTS)
    assert whole.num_rows == sum(each)
    rows = [row_key(row) for batch in iterate_validation(whole, 4, 0, 1, 0) for row in batch]
    alone = [ValidationStream([corpus], SHAPE) for corpus in corpora]
    expected = Counter(row_key(stream.row(index)) for stream in alone for index in range(stream.num_rows))
    assert Counter(rows[: whole.num_rows]) == expected
    assert ValidationStream(corpora, SHAPE, WEIGHTS, 4).num_rows == 4
    assert ValidationStream(corpora, SHAPE, (1000.0, 1.0), 2).num_rows == 3  # every corpus is looked at


def test_a_blend_is_opened_with_its_weights(folders: tuple[Path, Path]) -> None:
    blend = open_blend(DataConfig(blend=["3", str(folders[0]), "1", str(folders[1])]))
    assert blend.weights == WEIGHTS
    assert [corpus.prefix for corpus in blend.train] == [folder / "train" for folder in folders]
    both = " ".join(corpus.fingerprint for corpus in blend.train)
    assert blend.fingerprint == hashlib.sha256(both.encode()).hexdigest()
    assert blend.num_sequences == sum(corpus.num_sequences for corpus in blend.train)
    alone = open_blend(DataConfig(path=str(folders[0])))
    assert (alone.fingerprint, alone.weights) == (blend.train[0].fingerprint, (1.0,))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (DataConfig(), "give data.path"),
        (DataConfig(path="a", blend=["1", "b"]), "not both"),
        (DataConfig(blend=["1", "a", "2"]), "needs a folder after each weight"),
        (DataConfig(blend=["a", "1"]), "'a' where a weight above 0 belongs, before 1"),
        (DataConfig(blend=["0", "a"]), "'0' where a weight"),
        (DataConfig(blend=["inf", "a"]), "'inf' where a weight"),
        (DataConfig(blend=["1", "a", "2", "a"]), "names a twice"),
    ],
)
def test_what_is_no_blend_is_refused(data: DataConfig, named: str) -> None:
    with pytest.raises(InputError, match=named):
        folders_and_weights(data)


def test_corpora_that_do_not_fit_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", vocabulary=get_vocabulary("iupac"))
    with pytest.raises(InputError, match="has another vocabulary"):
        open_blend(DataConfig(blend=["1", str(folders[0]), "1", str(other)]))
    with pytest.raises(InputError, match="has no clusters"):
        open_blend(DataConfig(path=str(folders[0]), sampling="clusters"))
