"""Checkpoints: whole or not there, damage found and passed over, a full disk survived, nothing in them ever run."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import sha256_of
from megaprot.pretrain import checkpoint
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.training import Training
from megaprot.pretrain.validation import validate
from tests.pretrain.global_weights import gather_global
from tests.pretrain.runs import begin, copy_checkpoint, run, saved_tensors, small_config, write_corpus

FILES = [
    "manifest.json",
    "state.json",
    "config.yaml",
    "vocabulary.json",
    *(f"weights/{name}" for name in (".metadata", "__0_0.distcp", "common.pt", "metadata.json")),
]
SMALL_FILES = ["state.json", "config.yaml", "vocabulary.json"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": _flip,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, alone: Place) -> Training:
    """A run of four steps, saved after the second and the fourth."""
    folder = tmp_path_factory.mktemp("finished")
    training = begin(small_config(write_corpus(folder / "corpus"), folder / "run", train={"num_steps": 4}), alone)
    run(training)
    return training


@pytest.fixture
def saves(finished: Training, tmp_path: Path) -> Path:
    """A copy of its checkpoints that a test may damage."""
    return Path(shutil.copytree(finished.checkpoints, tmp_path / "run" / "checkpoints"))


def sign(folder: Path) -> None:
    """Make the manifest fit what now stands in a save, as who alters it on purpose would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_save_holds_what_the_run_is(finished: Training) -> None:
    newest = checkpoint.newest_complete(finished.checkpoints)
    assert newest == finished.checkpoints / "step_00000004"
    files = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(FILES)
    assert checkpoint.read_config(newest) == finished.config
    assert checkpoint.read_vocabulary(newest) == finished.blend.vocabulary
    assert checkpoint.read_state(newest) == finished.state
    assert (finished.state.step, finished.state.consumed_rows) == (4, 32)

    tensors = saved_tensors(newest)
    weights, _ = gather_global(chunk.module for chunk in finished.chunks)
    prefixes = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    assert {prefix + name for name in weights for prefix in prefixes} <= tensors.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in weights.items())
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
    assert layers == {"0", "1"}  # one key a layer, nothing stacked


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_save_is_named_and_the_one_before_taken(
    file: str, damage: str, saves: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = saves / "step_00000004"
    DAMAGES[damage](newest / file)
    assert checkpoint.newest_complete(saves) == saves / "step_00000002"
    said = capsys.readouterr().out
    assert said.startswith("checkpoint passed over: ")
    assert str(newest if (file, damage) == ("manifest.json", "flipped") else newest / file) in said


def test_no_whole_save_is_an_error_and_none_at_all_is_not(saves: Path, tmp_path: Path) -> None:
    (saves / "step_00000004" / "state.json").unlink()
    _flip(saves / "step_00000002" / "weights" / "__0_0.distcp")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole \(.*state\.json is missing\); restore one or"):
        checkpoint.newest_complete(saves)
    assert checkpoint.newest_complete(tmp_path / "absent") is None


def test_no_flipped_bit_of_a_manifest_crashes_or_hides_a_file(saves: Path, finished: Training) -> None:
    shutil.rmtree(saves / "step_00000004")
    folder = saves / "step_00000002"
    true = (folder / "manifest.json").read_bytes()
    files = json.loads(true)["files"]
    for place in range(len(true)):
        (folder / "manifest.json").write_bytes(true[:place] + bytes([true[place] ^ 1]) + true[place + 1 :])
        try:
            checkpoint.newest_complete(saves)
        except InputError:
            continue
        assert json.loads((folder / "manifest.json").read_bytes())["files"] == files


@pytest.mark.parametrize("file", SMALL_FILES)
def test_a_run_whose_newest_save_is_damaged_goes_on_from_the_one_before(
    file: str, saves: Path, finished: Training, alone: Place
) -> None:
    config = small_config(Path(finished.config.data.path), saves.parent, train={"num_steps": 4})
    _flip(saves / "step_00000004" / file)
    assert begin(config, alone).state.step == 2


def test_unfinished_and_foreign_entries_are_ignored(saves: Path) -> None:
    for name in (".step_00000009.partial", "step_00000009.partial", "step_9", "notes"):
        shutil.copytree(saves / "step_00000002", saves / name)
    (saves / ".step_00000008.partial").write_text("")
    assert checkpoint.saved_steps(saves) == [4, 2]


def test_pruning_keeps_the_newest_whole_ones_and_leaves_the_others(saves: Path) -> None:
    for step in (6, 8, 10):
        shutil.copytree(saves / "step_00000002", saves / f"step_{step:08d}")
    (saves / "step_00000010" / "config.yaml").unlink()
    checkpoint.prune(saves, 0, newest=10**6)
    assert checkpoint.saved_steps(saves) == [10, 8, 6, 4, 2]
    checkpoint.prune(saves, 2, newest=10**6)
    assert sorted(path.name for path in saves.iterdir()) == [f"step_{step:08d}" for step in (6, 8, 10)]


def test_pruning_after_a_resume_keeps_the_save_just_made_not_a_later_damaged_one(saves: Path) -> None:
    for step in (10, 20, 15):  # 20 was found damaged, the run went on from 10 and has just saved 15
        shutil.copytree(saves / "step_00000002", saves / f"step_{step:08d}")
    checkpoint.prune(saves, 1, newest=15)
    assert checkpoint.saved_steps(saves) == [20, 15]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process and its children grow beyond ``num_bytes``: writing more fails as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_space_for(module: Any, function: str) -> Iterator[None]:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, full)
        yield


@pytest.mark.parametrize(
    "full_disk",
    [
        pytest.param(lambda: file_size_limit(100_000), id="shards"),
        pytest.param(lambda: no_space_for(torch, "save"), id="common part"),
        pytest.param(lambda: no_space_for(checkpoint, "write_json_atomically"), id="small files"),
        pytest.param(lambda: no_space_for(checkpoint, "publish_folder"), id="renaming"),
        pytest.param(lambda: no_space_for(Path, "mkdir"), id="folder"),
    ],
)
def test_a_full_disk_leaves_older_saves_and_the_run_whole(
    full_disk: Callable[[], Any], saves: Path, finished: Training, alone: Place
) -> None:
    training = begin(small_config(Path(finished.config.data.path), saves.parent, train={"num_steps": 8}), alone)
    training.state.step = 6
    with full_disk(), pytest.raises(RunError, match=r"step_00000006.* free the disk") as error:
        training.save()
    assert "\n" not in str(error.value)
    assert checkpoint.saved_steps(saves) == [4, 2]
    assert checkpoint.newest_complete(saves) == saves / "step_00000004"
    training.save()
    assert checkpoint.newest_complete(saves) == saves / "step_00000006"
    assert not list(saves.glob(".*"))


class Evil:
    """Pickles as a shell command."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def evil_index(weights: Path, evil: Evil) -> None:
    (weights / ".metadata").write_bytes(pickle.dumps(evil))


def evil_inside_the_index(weights: Path, evil: Evil) -> None:
    index = FileSystemReader(weights).read_metadata()
    index.planner_data = [evil]
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def evil_common_part(weights: Path, evil: Evil) -> None:
    torch.save({"optimizer": evil}, weights / "common.pt")


def evil_tensors(weights: Path, evil: Evil) -> None:
    with open(weights / "__0_0.distcp", "r+b") as stream:
        for entry in FileSystemReader(weights).read_metadata().storage_data.values():
            stream.seek(entry.offset)
            torch.save(evil, stream, _use_new_zipfile_serialization=False)


def index_of_bytes(weights: Path, evil: Evil) -> None:
    index = FileSystemReader(weights).read_metadata()
    index.state_dict_metadata["optimizer.anything"] = BytesStorageMetadata()
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def index_of_other_things(weights: Path, evil: Evil) -> None:
    index = FileSystemReader(weights).read_metadata()
    entries: dict[str, Any] = index.state_dict_metadata
    entries["optimizer.anything"] = StorageMeta()
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def no_index(weights: Path, evil: Evil) -> None:
    (weights / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))


def foreign_backend(weights: Path, evil: Evil) -> None:
    (weights / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


@pytest.mark.parametrize(
    "attack",
    [
        evil_index,
        evil_inside_the_index,
        evil_common_part,
        evil_tensors,
        index_of_bytes,
        index_of_other_things,
        no_index,
        foreign_backend,
    ],
)
def test_a_save_made_to_do_harm_is_refused_in_one_sentence(
    attack: Callable[[Path, Evil], None], finished: Training, tmp_path: Path, alone: Place
) -> None:
    folder = copy_checkpoint(finished.checkpoints / "step_00000004", tmp_path / "run")
    marker = tmp_path / "ran"
    attack(folder / "weights", Evil(marker))
    sign(folder)
    config = small_config(Path(finished.config.data.path), tmp_path / "run")
    with pytest.raises(InputError) as error:
        begin(config, alone)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_another_model_is_refused_in_one_sentence(finished: Training, tmp_path: Path, alone: Place) -> None:
    shape = {"num_layers": 3, "hidden_size": 48}
    other = begin(small_config(Path(finished.config.data.path), tmp_path, model=shape), alone)
    with pytest.raises(InputError, match=r"step_00000004 does not fit this model") as error:
        checkpoint.load(finished.checkpoints / "step_00000004", other.chunks, other.optimizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"step": 1, "unknown": 2}', "{"])
def test_small_files_that_cannot_be_read_are_named(content: str, saves: Path) -> None:
    folder = saves / "step_00000004"
    for name in SMALL_FILES:
        (folder / name).write_text(content)
    for read, name in ((checkpoint.read_state, "state.json"), (checkpoint.read_vocabulary, "vocabulary.json")):
        with pytest.raises(InputError, match=name):
            read(folder)


def test_the_check_before_the_start_looks_at_the_newest_sound_save(saves: Path, finished: Training) -> None:
    config = small_config(Path(finished.config.data.path), saves.parent, model={"token_dropout": True})
    _flip(saves / "step_00000004" / "config.yaml")
    with pytest.raises(InputError, match=r"model\.token_dropout is True, but the run in .* began with False"):
        validate(config, 1)
