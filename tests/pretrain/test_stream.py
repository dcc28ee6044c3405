"""The stream of rows: the same for any number of loader processes, ranks and restarts, and right row by row."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaprot.common.errors import InputError, RunError
from megaprot.common.masking import MaskingConfig, masked_capacity
from megaprot.common.packing import PackedRow
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.corpus import Corpus, CorpusWriter
from megaprot.pretrain.loading import StepRows, iterate_steps, iterate_validation
from megaprot.pretrain.rows import RowShape
from megaprot.pretrain.stream import CorpusPosition, StreamPosition, TrainingStream, ValidationStream

ESM = get_vocabulary("esm")
ROW_TOKENS, LONGEST = 256, 100


def shape_of(row_tokens: int, longest: int = LONGEST, masking: MaskingConfig | None = None) -> RowShape:
    masking = masking or MaskingConfig()
    return RowShape(row_tokens, longest, masking, masked_capacity(row_tokens, masking))


SHAPE = shape_of(ROW_TOKENS)
RowKey = tuple[bytes, ...]


def write_corpus(prefix: Path, sequences: list[list[int]], vocabulary_name: str = "esm") -> Corpus:
    writer = CorpusWriter(prefix, get_vocabulary(vocabulary_name))
    for sequence in sequences:
        writer.add(np.array(sequence, dtype=np.uint8))
    writer.finish({})
    return Corpus.open(prefix)


def random_sequences(num_sequences: int, longest: int = 160) -> list[list[int]]:
    generator = np.random.default_rng(11)
    lengths = generator.integers(1, longest, num_sequences)
    return [generator.choice(ESM.replacements, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "train", random_sequences(150))


def training(corpus: Corpus, seed: int = 7) -> TrainingStream:
    return TrainingStream([corpus], SHAPE, seed)


def validation(corpus: Corpus, max_rows: int = 0) -> ValidationStream:
    return ValidationStream([corpus], SHAPE, max_rows=max_rows)


def row_key(row: PackedRow) -> RowKey:
    """Everything in a row, to compare rows by."""
    arrays = (row.tokens, row.positions, row.cu_seqlens, row.masked_positions, row.labels, row.masked_kind)
    return (*(array.tobytes() for array in arrays), str((row.num_sequences, row.num_residues)).encode())


def true_sequences(row: PackedRow) -> list[list[int]]:
    """The residues of each sequence of a row with the masks undone and the boundary tokens checked."""
    tokens = row.tokens.copy()
    used = row.masked_kind > 0
    tokens[row.masked_positions[used]] = row.labels[used]
    found = []
    for start, end in zip(row.cu_seqlens[: row.num_sequences], row.cu_seqlens[1:], strict=False):
        assert (tokens[start], tokens[end - 1]) == (ESM.begin, ESM.end)
        assert row.positions[start:end].tolist() == list(range(end - start))
        found.append(tokens[start + 1 : end - 1].tolist())
    assert set(tokens[row.cu_seqlens[row.num_sequences] :].tolist()) <= {ESM.pad}
    return found


def is_crop(piece: list[int], whole: list[int]) -> bool:
    if len(whole) <= LONGEST - 2:
        return piece == whole
    starts = range(len(whole) - len(piece) + 1)
    return len(piece) == LONGEST - 2 and any(whole[start : start + len(piece)] == piece for start in starts)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sequences=st.lists(st.lists(st.sampled_from(ESM.replacements), min_size=1, max_size=150), min_size=1, max_size=9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
)
def test_an_epoch_of_rows_holds_every_sequence_once_whole_or_cropped(
    tmp_path: Path, sequences: list[list[int]], seed: int, epoch: int
) -> None:
    corpus = write_corpus(tmp_path / "train", sequences)
    stream = training(corpus, seed)
    read: list[int] = []
    for index in range(stream.num_rows(epoch)):
        row = stream.row(epoch, index)
        pieces = true_sequences(row)
        ids = stream.sequences(0, epoch, index).tolist()
        assert len(pieces) == len(ids)
        assert all(is_crop(piece, sequences[number]) for piece, number in zip(pieces, ids, strict=True))
        assert row.num_residues == sum(map(len, pieces))
        read += ids
    assert sorted(read) == list(range(len(sequences)))


@pytest.mark.parametrize("name", ["iupac", "proteinlm"])
def test_other_vocabularies_get_their_own_boundary_and_mask_tokens(name: str, tmp_path: Path) -> None:
    vocabulary = get_vocabulary(name)
    residues = [list(vocabulary.replacements)] * 8
    corpus = write_corpus(tmp_path / "train", residues, name)
    stream = TrainingStream([corpus], RowShape(256, 64, MaskingConfig(0.5, 1.0, 0.0), 256), seed=0)
    row = stream.row(0, 0)
    assert (row.tokens[row.cu_seqlens[:8]] == vocabulary.begin).all()
    if vocabulary.end >= 0:
        assert (row.tokens[row.cu_seqlens[1:9] - 1] == vocabulary.end).all()
    assert np.count_nonzero(row.tokens == vocabulary.mask) == np.count_nonzero(row.masked_kind) > 40
    assert row.cu_seqlens[8] == 8 * (20 + vocabulary.num_boundary_tokens)


def test_crops_and_masks_differ_between_epochs_and_seeds_and_crops_reach_both_ends(tmp_path: Path) -> None:
    whole = [ESM.replacements[place % 20] for place in range(LONGEST + 1)]  # three places to crop at
    corpus = write_corpus(tmp_path / "train", [whole])
    rows = [training(corpus, seed).row(epoch, 0) for seed in range(6) for epoch in range(10)]
    starts = {whole.index(true_sequences(row)[0][0]) for row in rows}
    assert starts == {0, 1, 2, 3}
    assert len({row.masked_positions.tobytes() for row in rows}) == len(rows)


def test_training_masks_do_not_depend_on_the_row_that_a_sequence_is_in(corpus: Corpus) -> None:
    wide = TrainingStream([corpus], shape_of(1024), seed=7)

    def by_sequence(stream: TrainingStream) -> dict[int, bytes]:
        found = {}
        for index in range(stream.num_rows(0)):
            row = stream.row(0, index)
            for place, number in enumerate(stream.sequences(0, 0, index).tolist()):
                found[number] = row.tokens[row.cu_seqlens[place] : row.cu_seqlens[place + 1]].tobytes()
        return found

    assert by_sequence(training(corpus)) == by_sequence(wide)


def test_validation_masks_and_crops_depend_on_the_sequence_alone(tmp_path: Path) -> None:
    sequences = random_sequences(60)
    shuffled = [sequences[place] for place in np.random.default_rng(5).permutation(60)]

    def masked_sequences(name: str, content: list[list[int]], row_tokens: int) -> list[bytes]:
        stream = ValidationStream([write_corpus(tmp_path / name, content)], shape_of(row_tokens))
        found = []
        for index in range(stream.num_rows):
            row = stream.row(index)
            bounds = row.cu_seqlens.tolist()
            found += [row.tokens[bounds[n] : bounds[n + 1]].tobytes() for n in range(row.num_sequences)]
        return sorted(found)

    expected = masked_sequences("a", sequences, 256)
    assert masked_sequences("b", shuffled, 256) == expected
    assert masked_sequences("c", shuffled, 512) == expected
    assert set(masked_sequences("d", sequences[:30], 256)) < set(expected)


def ramp_up(step: int) -> int:
    return 4 if step < 3 else 8


def global_steps(
    stream: TrainingStream, steps: range, position: StreamPosition, size: int, num_workers: int = 0
) -> list[list[RowKey]]:
    """The rows of each global batch, row j from rank j % size."""
    ranks: list[Iterator[StepRows]] = [
        iterate_steps(stream, position, steps, ramp_up, rank, size, num_workers) for rank in range(size)
    ]
    found = []
    for step in steps:
        of_ranks = [next(rank) for rank in ranks]
        assert all(of_rank.step == step for of_rank in of_ranks)
        assert len({of_rank.position_after for of_rank in of_ranks}) == 1
        found.append([row_key(of_ranks[j % size].rows[j // size]) for j in range(ramp_up(step))])
    assert all(next(rank, None) is None for rank in ranks)
    return found


@pytest.fixture(scope="module")
def expected_steps(corpus: Corpus) -> list[list[RowKey]]:
    """Nine steps by plain calls of ``row``: more than one epoch."""
    stream = training(corpus)
    rows = ((epoch, index) for epoch in range(9) for index in range(stream.num_rows(epoch)))
    steps = [[row_key(stream.row(*place)) for place in islice(rows, ramp_up(step))] for step in range(9)]
    assert sum(map(ramp_up, range(9))) > stream.num_rows(0)
    return steps


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(
    corpus: Corpus, expected_steps: list[list[RowKey]], size: int
) -> None:
    assert global_steps(training(corpus), range(9), StreamPosition(), size) == expected_steps


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_restart_at_any_step_goes_on_with_the_same_rows(
    corpus: Corpus, expected_steps: list[list[RowKey]], stop: int
) -> None:
    before = list(iterate_steps(training(corpus), StreamPosition(), range(stop), ramp_up, 0, 1, 0))
    saved = StreamPosition.from_dict(before[-1].position_after.to_dict())
    assert global_steps(training(corpus), range(stop, 9), saved, size=2) == expected_steps[stop:]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_loader_processes_change_nothing(corpus: Corpus, expected_steps: list[list[RowKey]], num_workers: int) -> None:
    state = torch.get_rng_state()
    assert global_steps(training(corpus), range(9), StreamPosition(), 1, num_workers) == expected_steps
    assert torch.equal(torch.get_rng_state(), state)  # else dropout would depend on when a loader starts


@pytest.mark.parametrize(("size", "num_workers"), [(1, 0), (2, 0), (4, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_the_first_thousand_rows_have_the_same_checksum_everywhere(tmp_path: Path, size: int, num_workers: int) -> None:
    letters = ESM.replacements
    sequences = [[letters[(7 * i + j * j) % 20] for j in range(1 + 37 * i % 160)] for i in range(400)]
    stream = training(write_corpus(tmp_path / "train", sequences))
    ranks = [
        iterate_steps(stream, stream.start, range(125), lambda step: 8, rank, size, num_workers) for rank in range(size)
    ]
    digest = hashlib.sha256()
    for _ in range(125):
        of_ranks = [next(rank).rows for rank in ranks]
        for row in range(8):
            found = of_ranks[row % size][row // size]
            used_places = np.where(found.masked_kind > 0, found.masked_positions, 0)
            digest.update(b"".join(row_key(replace(found, masked_positions=used_places))))
    # A run that is resumed with another version goes on with these rows too: what changes them breaks that.
    assert digest.hexdigest() == "00adb4ee34cc4bcd3a6daf62034440a7e5d97a6c832da2e35413983ca1b859ff"


def test_reading_draws_nothing_from_global_generators(corpus: Corpus) -> None:
    state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    list(iterate_steps(training(corpus), StreamPosition(), range(2), ramp_up, 0, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert pickle.dumps(np.random.get_state()) == numpy_state


def at(epoch: int, row: int, num_read: int = 0) -> StreamPosition:
    """The position of a stream of one corpus."""
    return StreamPosition(num_read, (CorpusPosition(epoch, row),))


@given(row=st.integers(0, 10), num_rows=st.integers(0, 200))
def test_advancing_is_counting_rows_one_by_one(corpus: Corpus, row: int, num_rows: int) -> None:
    stream = training(corpus)
    epoch, expected = 0, row
    for _ in range(num_rows):
        expected += 1
        if expected == stream.num_rows(epoch):
            epoch, expected = epoch + 1, 0
    assert stream.advance(at(0, row), num_rows) == at(epoch, expected, num_rows)


def test_a_batch_larger_than_the_corpus_goes_round_it(tmp_path: Path) -> None:
    stream = training(write_corpus(tmp_path / "train", [[5, 6, 7]]))
    assert stream.rows_of_step(StreamPosition(), 6, 1, 2) == [(0, 1, 0), (0, 3, 0), (0, 5, 0)]
    [step] = iterate_steps(stream, StreamPosition(), [0], lambda step: 6, 1, 2, 0)
    assert [row_key(row) for row in step.rows] == [row_key(stream.row(epoch, 0)) for epoch in (1, 3, 5)]
    assert step.position_after == at(6, 0, 6)


@pytest.mark.parametrize(("batch_rows", "size"), [(4, 1), (4, 2), (8, 4)])
def test_validation_reads_every_row_once_and_fills_the_last_batch_with_blanks(
    corpus: Corpus, batch_rows: int, size: int
) -> None:
    stream = validation(corpus)
    ranks = [list(iterate_validation(stream, batch_rows, rank, size, 0)) for rank in range(size)]
    assert stream.num_rows % batch_rows  # the last batch is uneven
    num_batches = stream.num_batches(batch_rows)
    assert all([len(batch) for batch in rank] == [batch_rows // size] * num_batches for rank in ranks)
    dealt = [
        row for batch in range(num_batches) for row in (ranks[j % size][batch][j // size] for j in range(batch_rows))
    ]
    expected = [row_key(stream.row(index)) for index in range(stream.num_rows)]
    assert [row_key(row) for row in dealt[: stream.num_rows]] == expected
    for blank in dealt[stream.num_rows :]:
        assert (blank.num_sequences, blank.num_residues) == (0, 0)
        assert blank.cu_seqlens.tolist() == [0, ROW_TOKENS]
        assert not blank.masked_kind.any()
        assert not blank.positions.any()
        assert set(blank.tokens.tolist()) == set(blank.labels.tolist()) == {ESM.pad}


def test_a_limit_keeps_the_first_validation_rows(corpus: Corpus) -> None:
    whole, cut = validation(corpus), validation(corpus, max_rows=5)
    assert cut.num_rows == 5 < whole.num_rows
    rows = [row for batch in iterate_validation(cut, 2, 0, 1, 0) for row in batch]
    assert [row_key(row) for row in rows[:5]] == [row_key(whole.row(index)) for index in range(5)]
    assert rows[5].num_sequences == 0
    assert validation(corpus, max_rows=10**6).num_rows == whole.num_rows


@pytest.mark.parametrize(
    "values",
    [
        {"epoch": 1, "row": 0},
        {"num_read": 0, "corpora": []},
        {"num_read": -1, "corpora": [{"epoch": 0, "row": 0}]},
        {"num_read": 0, "corpora": [{"epoch": 0, "row": -1}]},
        {"num_read": 0, "corpora": [{"epoch": 0, "row": 1.5}]},
        {"num_read": 0, "corpora": [{"epoch": 0}, 7]},
        {},
    ],
)
def test_a_position_that_is_none_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="data position"):
        StreamPosition.from_dict(values)


def test_uneven_batches_and_foreign_positions_are_refused(corpus: Corpus) -> None:
    stream = training(corpus)
    with pytest.raises(ValueError, match="6 rows cannot be dealt evenly to 4 ranks"):
        stream.rows_of_step(StreamPosition(), 6, 0, 4)
    with pytest.raises(ValueError, match="cannot be dealt evenly"):
        validation(corpus).rows_of_batch(0, 3, 0, 2)
    with pytest.raises(InputError, match="one of 2 corpora, not 1"):
        stream.advance(StreamPosition(0, (CorpusPosition(), CorpusPosition())), 1)
    with pytest.raises(InputError, match="row 100000 of epoch 0"):
        stream.advance(at(0, 100_000), 1)
    with pytest.raises(InputError, match="max_sequence_length"):
        TrainingStream([corpus], shape_of(64, 65), seed=0)


@pytest.mark.slow
def test_a_corpus_lost_under_a_loader_process_is_one_sentence(tmp_path: Path) -> None:
    stream = training(write_corpus(tmp_path / "train", random_sequences(20)))
    (tmp_path / "train.bin").unlink()
    with pytest.raises(InputError, match=r"train\.bin") as caught:
        next(iterate_steps(stream, StreamPosition(), range(1), lambda step: 1, 0, 1, 1))
    assert "\n" not in str(caught.value)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def loaders(process: int) -> list[int]:
    return [child for child in children(process) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


READER = """
import sys, time
from pathlib import Path
from megaprot.common.masking import MaskingConfig
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.loading import iterate_steps
from megaprot.pretrain.rows import RowShape
from megaprot.pretrain.stream import StreamPosition, TrainingStream

if __name__ == "__main__":
    stream = TrainingStream([Corpus.open(Path(sys.argv[1]))], RowShape(256, 100, MaskingConfig(), 128), 0)
    for step_rows in iterate_steps(stream, StreamPosition(), range(10**9), lambda step: 2, 0, 1, 2):
        print("read", flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("is_started", [True, False])
def test_loader_processes_end_with_a_killed_parent(corpus: Corpus, tmp_path: Path, is_started: bool) -> None:
    script = tmp_path / "reader.py"
    script.write_text(READER)
    reader = subprocess.Popen([sys.executable, str(script), str(corpus.prefix)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    if is_started:
        assert reader.stdout.readline() == "read\n"
    assert wait_until(lambda: len(loaders(reader.pid)) == 2, seconds=60)
    workers = children(reader.pid)
    reader.kill()
    reader.wait()
    reader.stdout.close()
    assert wait_until(lambda: not any(map(is_running, workers)), seconds=30)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_loader_process_ignores_slurms_warning_and_its_death_is_one_sentence(corpus: Corpus) -> None:
    before = set(loaders(os.getpid()))
    steps = iterate_steps(training(corpus), StreamPosition(), range(10**9), lambda step: 1, 0, 1, 1)
    next(steps)
    [worker] = set(loaders(os.getpid())) - before
    for number in (signal.SIGUSR1, signal.SIGINT):
        os.kill(worker, number)
    for _ in range(20):
        next(steps)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RunError, match=r"a data loader process died .*num_workers") as caught:
        for _ in range(1000):
            next(steps)
    assert "\n" not in str(caught.value)
