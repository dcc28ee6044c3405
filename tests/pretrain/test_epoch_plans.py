"""Plans on disk: made once, the same for all, replaced when damaged; and the draw of cluster members."""

import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megaprot.common.counter_random import key
from megaprot.common.errors import InputError
from megaprot.common.packing_plan import PackingPlan, plan_epoch
from megaprot.pretrain import epoch_plans
from megaprot.pretrain.corpus import Corpus, CorpusWriter
from megaprot.pretrain.epoch_plans import EpochPlans, filed_plan, user_folder
from tests.pretrain.test_stream import ESM, SHAPE, random_sequences, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "train", random_sequences(200))


def plan_of(number: int) -> PackingPlan:
    return plan_epoch(np.arange(1, 90), 256, 100, 2, number, 0)


def test_filed_plans_are_the_plans(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = EpochPlans(corpus, SHAPE, 3)
    monkeypatch.setattr(epoch_plans, "FILED_FROM", 1)
    for _ in range(2):
        filed = EpochPlans(corpus, SHAPE, 3, folder=str(tmp_path / "plans"))
        for epoch in range(3):
            assert filed.plan(epoch).sequence_ids.tolist() == expected.plan(epoch).sequence_ids.tolist()
            assert filed.plan(epoch).row_starts.tolist() == expected.plan(epoch).row_starts.tolist()
    assert len(list((tmp_path / "plans").iterdir())) == 3
    EpochPlans(corpus, SHAPE, 4, folder=str(tmp_path / "plans")).plan(0)
    assert len(list((tmp_path / "plans").iterdir())) == 4


def open_at_once(folder: Path, made: Path) -> None:
    def make() -> PackingPlan:
        (made / str(os.getpid())).touch()
        time.sleep(0.5)
        return plan_of(1)

    assert filed_plan(folder, "name", make).sequence_ids.tolist() == plan_of(1).sequence_ids.tolist()


def test_one_of_many_processes_makes_a_plan_and_the_others_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_at_once, args=(tmp_path / "plans", tmp_path / "made")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list((tmp_path / "made").iterdir())) == 1
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["name"]


@pytest.mark.parametrize("size", [0, 40, 300])
def test_a_damaged_plan_is_made_again(tmp_path: Path, size: int) -> None:
    filed_plan(tmp_path, "name", lambda: plan_of(1))
    os.truncate(tmp_path / "name" / "sequence_ids.npy", size)
    again = filed_plan(tmp_path, "name", lambda: plan_of(1))
    assert again.sequence_ids.tolist() == plan_of(1).sequence_ids.tolist()


def test_the_plans_used_longest_ago_go_and_one_in_use_stays_readable(tmp_path: Path) -> None:
    first = filed_plan(tmp_path, "first", lambda: plan_of(0))
    expected = plan_of(0).sequence_ids.tolist()
    for number in range(12):
        filed_plan(tmp_path, f"plan{number}", lambda: plan_of(1))
        time.sleep(0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"plan{number}" for number in range(4, 12))
    assert first.sequence_ids.tolist() == expected


def test_where_plans_cannot_be_written_each_process_makes_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    plan = filed_plan(tmp_path / "file" / "plans", "name", lambda: plan_of(2))
    assert plan.sequence_ids.tolist() == plan_of(2).sequence_ids.tolist()
    assert "cannot be filed" in capsys.readouterr().err


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_plans.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = user_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(InputError, match="not this user's own folder"):
        user_folder()
    folder.rmdir()
    for stand_in in (folder.touch, lambda: folder.symlink_to(tmp_path)):
        stand_in()
        with pytest.raises(InputError, match="not this user's own folder"):
            user_folder()
        folder.unlink()


def test_without_a_folder_for_temporary_files_plans_are_kept_in_memory(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(epoch_plans.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    monkeypatch.setattr(epoch_plans, "FILED_FROM", 1)
    assert EpochPlans(corpus, SHAPE, 1).plan(0).num_rows > 0
    assert "cannot be filed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Clusters of 1, 2, ... 9 sequences; a sequence has the number of its cluster as its length."""
    prefix = tmp_path_factory.mktemp("clustered") / "train"
    writer = CorpusWriter(prefix, ESM)
    clusters = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 10), np.arange(1, 10)))
    for cluster in clusters:
        writer.add(np.full(cluster, 5, dtype=np.uint8))
    writer.finish({}, clusters.astype(np.uint64))
    return Corpus.open(prefix)


def test_an_epoch_by_clusters_has_one_member_of_each(clustered: Corpus) -> None:
    plans = EpochPlans(clustered, SHAPE, 1, by_clusters=True)
    drawn: Counter[int] = Counter()
    for epoch in range(900):
        numbers = plans.plan(epoch).sequence_ids
        assert sorted(clustered.lengths[numbers].tolist()) == list(range(1, 10))
        drawn.update(numbers.tolist())
    for number, length in enumerate(clustered.lengths.tolist()):  # a cluster's members come equally often
        expected = 900 / length
        assert abs(drawn[number] - expected) < 5 * np.sqrt(expected) + 1e-9


def test_members_drawn_depend_on_seed_and_epoch(clustered: Corpus) -> None:
    numbers = {
        (seed, epoch): tuple(sorted(EpochPlans(clustered, SHAPE, seed, True).plan(epoch).sequence_ids.tolist()))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(numbers.values())) == 4
    assert EpochPlans(clustered, SHAPE, 1, True).plan(0).row(0).dtype == np.int64
    assert key(5, 1, 0) != key(5, 1, 1)
