"""Corpora against Megatron's own readers, and against every way a file can be damaged."""

import itertools
import json
import pickle
import random
import struct
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary, get_vocabulary
from megaprot.pretrain import corpus as corpus_module
from megaprot.pretrain.corpus import Corpus, CorpusWriter, manifest_digest

SEQUENCES = ["MKTAYIAKQR", "A", "WWCXBUZO", "ACDEFGHIKLMNPQRSTVWY" * 20]
SUFFIXES = (".bin", ".idx", ".json")


def write_corpus(prefix: Path, sequences: list[str], name: str = "esm", family: int = -1) -> Path:
    writer = CorpusWriter(prefix, get_vocabulary(name))
    for sequence in sequences:
        writer.add(writer.vocabulary.encode(sequence.encode())[0], family)
    writer.finish({"sources": [], "split": {"name": "train"}})
    return prefix


def ids_of(sequence: str, name: str = "esm") -> list[int]:
    return [get_vocabulary(name).tokens.index(letter) for letter in sequence]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "train", SEQUENCES)


def corpus_path(prefix: Path, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")


@pytest.mark.parametrize("name", ["esm", "iupac", "proteinlm"])
def test_megatron_core_reads_the_same_ids(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = write_corpus(tmp_path / "uniref.v1", SEQUENCES, name)
    dataset = IndexedDataset(str(prefix))
    assert [dataset[index].tolist() for index in range(len(dataset))] == [ids_of(text, name) for text in SEQUENCES]
    assert dataset[0].dtype == np.uint8
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.sequence_lengths.tolist() == [len(text) for text in SEQUENCES]


def test_megatron_tokenizer_lite_reads_the_same_ids(prefix: Path) -> None:
    reader = pytest.importorskip("megatron_tokenizer_lite.indexed_dataset")
    dataset = reader.make_dataset(str(prefix))
    assert [dataset[index].tolist() for index in range(len(dataset))] == [ids_of(text) for text in SEQUENCES]
    assert dataset.doc_idx.tolist() == [0, 1, 2, 3, 4]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    sequences=st.lists(st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=40), min_size=1, max_size=12),
    block=st.integers(1, 5),
)
def test_what_is_written_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: list[str], block: int
) -> None:
    monkeypatch.setattr(corpus_module, "CHECK_BLOCK", block)
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", block)
    corpus = Corpus.open(write_corpus(tmp_path / "train", sequences))
    corpus.verify()
    assert [corpus.sequence(index).tolist() for index in range(corpus.num_sequences)] == [*map(ids_of, sequences)]
    assert corpus.residues.tolist() == ids_of("".join(sequences))
    assert corpus.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert corpus.offsets.tolist() == [sum(map(len, sequences[:index])) for index in range(len(sequences))]
    assert (corpus.lengths.dtype, corpus.offsets.dtype) == (np.int32, np.int64)


def test_the_manifest_says_what_the_corpus_holds(tmp_path: Path) -> None:
    corpus = Corpus.open(write_corpus(tmp_path / "train", ["A" * 31, "A" * 32, "A" * 63, "A" * 9000], family=1))
    assert corpus.manifest["num_residues"] == corpus.num_residues == 31 + 32 + 63 + 9000
    assert corpus.manifest["length_histogram"]["counts"] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert corpus.manifest["families"] == {"PF00001": 4}
    assert corpus.vocabulary == get_vocabulary("esm")
    digests = subprocess.run(["sha256sum", f"{corpus.prefix}.bin"], capture_output=True, text=True, check=True).stdout
    assert corpus.fingerprint == digests.split()[0]


def test_nothing_can_be_written_through_an_open_corpus(prefix: Path) -> None:
    corpus = Corpus.open(prefix)
    for array in (corpus.residues, corpus.lengths, corpus.offsets, corpus.sequence(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_corpus_pickles_without_its_residues(tmp_path: Path) -> None:
    corpus = Corpus.open(write_corpus(tmp_path / "train", ["ACDEF" * 10_000]))
    assert corpus.residues[0] == ids_of("A")[0]
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 5_000
    again = pickle.loads(pickled)  # noqa: S301 - our own bytes
    assert np.array_equal(again.sequence(0), corpus.sequence(0))
    assert again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("index", [-1, len(SEQUENCES)])
def test_a_sequence_outside_the_corpus_is_an_index_error(prefix: Path, index: int) -> None:
    with pytest.raises(IndexError):
        Corpus.open(prefix).sequence(index)


@pytest.mark.parametrize("ids", [np.array([], dtype=np.uint8), np.array([5, 300], dtype=np.int64)])
def test_only_non_empty_sequences_of_bytes_can_be_added(tmp_path: Path, ids: npt.NDArray[np.uint8]) -> None:
    writer = CorpusWriter(tmp_path / "train", get_vocabulary("esm"))
    with pytest.raises(ValueError, match="must be uint8, and all sequences non-empty"):
        writer.add(ids)
    with pytest.raises(ValueError, match="at least one sequence"):
        writer.finish({})
    writer.close()


def test_an_unfinished_corpus_is_refused(tmp_path: Path) -> None:
    writer = CorpusWriter(tmp_path / "train", get_vocabulary("esm"))
    writer.add(np.array([5, 6], dtype=np.uint8))
    writer.close()
    with pytest.raises(InputError, match=r"train\.json: is missing"):
        Corpus.open(tmp_path / "train")


def shorten(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"", "is empty"),
        (shorten, "is truncated"),
        (lambda content: content * 2, "is (too long|trunc)"),
    ],
)
def test_a_file_of_another_size_is_named_at_open(
    prefix: Path, suffix: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    path = corpus_path(prefix, suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"train\{suffix}: {said}.*run `megaprot preprocess` again") as caught:
        Corpus.open(prefix)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named_at_open(prefix: Path, suffix: str) -> None:
    corpus_path(prefix, suffix).unlink()
    with pytest.raises(InputError, match=rf"train\{suffix}: is missing"):
        Corpus.open(prefix)


def test_a_folder_in_place_of_a_prefix_is_explained(prefix: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder: name a split in it, such as .*train"):
        Corpus.open(prefix.parent)


def flip(path: Path, position: int, bit: int) -> bytes:
    """Flip one bit and return the content as it was."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    path.write_bytes(changed)
    return content


def test_any_flipped_bit_of_the_index_is_found_at_open(prefix: Path) -> None:
    path = corpus_path(prefix, ".idx")
    for position in range(path.stat().st_size):
        content = flip(path, position, position % 8)
        with pytest.raises(InputError, match=r"train\.idx"):
            Corpus.open(prefix)
        path.write_bytes(content)
    Corpus.open(prefix).verify()


def test_any_flipped_bit_of_the_manifest_is_found_at_open_unless_it_changes_nothing(prefix: Path) -> None:
    path = corpus_path(prefix, ".json")
    before = json.loads(path.read_text())
    choose = random.Random(1)
    for _ in range(300):
        content = flip(path, choose.randrange(path.stat().st_size), choose.randrange(8))
        try:
            assert Corpus.open(prefix).manifest == before  # one white space became another
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
        path.write_bytes(content)


def test_any_flipped_bit_of_the_residues_is_found_by_verify(prefix: Path) -> None:
    path = corpus_path(prefix, ".bin")
    for position in range(0, path.stat().st_size, 7):
        content = flip(path, position, position % 8)
        corpus = Corpus.open(prefix)
        with pytest.raises(InputError, match=r"train\.bin: its content was altered"):
            corpus.verify_if_small()
        assert not corpus.verify_if_small(max_bytes=10)
        path.write_bytes(content)
    assert Corpus.open(prefix).verify_if_small()


def rewrite_manifest(prefix: Path, **changes: object) -> None:
    path = corpus_path(prefix, ".json")
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "train", ["ACZ"], "proteinlm")
    assert Corpus.open(prefix).residues.max() == 30
    rewrite_manifest(prefix, vocabulary=get_vocabulary("iupac").to_dict())
    with pytest.raises(InputError, match="holds the token id 30, but the vocabulary 'iupac' ends at 29"):
        Corpus.open(prefix).verify()


def test_a_manifest_with_another_vocabulary_of_the_same_name_is_named(prefix: Path) -> None:
    other = get_vocabulary("esm").to_dict() | {"mask": 31}
    rewrite_manifest(prefix, vocabulary=other)
    with pytest.raises(InputError, match=r"train\.json: the recorded vocabulary 'esm'"):
        Corpus.open(prefix)


def test_another_format_version_is_refused(prefix: Path) -> None:
    rewrite_manifest(prefix, format_version=1)
    with pytest.raises(InputError, match="is of format version 1, this version of megaprot reads 2"):
        Corpus.open(prefix)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "other"}'])
def test_other_json_is_no_manifest(prefix: Path, content: str) -> None:
    corpus_path(prefix, ".json").write_text(content)
    with pytest.raises(InputError, match="is not the manifest of a corpus"):
        Corpus.open(prefix)


def test_files_of_another_corpus_of_equal_size_are_found(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "train", ["ACD", "AC"])
    other = write_corpus(tmp_path / "other", ["AC", "DAC"])
    corpus_path(other, ".idx").rename(corpus_path(prefix, ".idx"))
    with pytest.raises(InputError, match=r"train\.idx: its content was altered"):
        Corpus.open(prefix).verify()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    block=st.integers(1, 20),
)
def test_sequences_added_many_at_a_time_are_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], cuts: list[int], block: int
) -> None:
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", block)
    ids = np.arange(sum(lengths), dtype=np.int64) % 20 + 4
    families = np.array([length // 3 - 1 for length in lengths], dtype=np.int32)
    one_by_one, in_blocks = (CorpusWriter(tmp_path / name, get_vocabulary("esm")) for name in ("one", "blocks"))
    ends = np.cumsum(lengths)
    for end, length, family in zip(ends, lengths, families.tolist(), strict=True):
        one_by_one.add(ids[end - length : end].astype(np.uint8), family)
    edges = sorted({0, *(min(cut, len(lengths)) for cut in cuts), len(lengths)})
    for start, end in itertools.pairwise(edges):
        first = ends[start] - lengths[start]
        part = ids[first : ends[end - 1]].astype(np.uint8)
        in_blocks.add_block(part, np.array(lengths[start:end], dtype=np.int32), families[start:end])
    for writer in (one_by_one, in_blocks):
        writer.finish({})
    for suffix in SUFFIXES:
        assert (
            corpus_path(tmp_path / "one", suffix).read_bytes() == corpus_path(tmp_path / "blocks", suffix).read_bytes()
        )
    counted = Corpus.open(tmp_path / "blocks").manifest["families"]
    assert counted == {
        f"PF{number:05d}": count for number, count in sorted(Counter(families.tolist()).items()) if number >= 0
    }


def large_vocabulary() -> Vocabulary:
    """A vocabulary whose ids need two bytes."""
    tokens = tuple(f"piece{number}" for number in range(1000))
    return replace(get_vocabulary("esm"), name="large", tokens=tokens)


def test_ids_of_two_bytes_are_read_back_by_megatron_core_and_by_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    sequences = [np.array([999, 5, 300], dtype=np.uint16), np.array([256], dtype=np.uint16)]
    writer = CorpusWriter(tmp_path / "train", large_vocabulary())
    for sequence in sequences:
        writer.add(sequence)
    writer.finish({})
    dataset = IndexedDataset(str(tmp_path / "train"))
    assert dataset[0].dtype == np.uint16
    monkeypatch.setattr(corpus_module.Vocabulary, "from_dict", lambda values: large_vocabulary())
    corpus = Corpus.open(tmp_path / "train")
    corpus.verify()
    for index, sequence in enumerate(sequences):
        assert dataset[index].tolist() == corpus.sequence(index).tolist() == sequence.tolist()
    assert corpus.offsets.tolist() == [0, 3]  # in tokens
    assert corpus.manifest["files"][".bin"]["num_bytes"] == 8
    for array in (corpus.residues, corpus.offsets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    test_any_flipped_bit_of_the_index_is_found_at_open(tmp_path / "train")


@pytest.fixture
def clustered(tmp_path: Path) -> Path:
    writer = CorpusWriter(tmp_path / "train", get_vocabulary("esm"))
    for _ in range(5):
        writer.add(np.array([5, 6], dtype=np.uint8))
    writer.finish({}, np.array([7, 3, 7, 2**63, 3], dtype=np.uint64))
    return tmp_path / "train"


def test_clusters_are_read_back(clustered: Path) -> None:
    corpus = Corpus.open(clustered)
    corpus.verify()
    starts, members = corpus.clusters
    assert [members[a:b].tolist() for a, b in itertools.pairwise(starts)] == [[1, 4], [0, 2], [3]]
    assert (starts.dtype, members.dtype) == (np.int64, np.int64)
    with pytest.raises(ValueError, match="read-only"):
        members[0] = 1


def test_the_file_of_clusters_is_laid_out_as_documented(clustered: Path) -> None:
    numbers = struct.unpack("<10q", corpus_path(clustered, ".clusters").read_bytes())
    assert numbers == (3, 0, 2, 4, 5, 1, 4, 0, 2, 3)


def test_any_flipped_bit_of_the_clusters_is_found_at_open(clustered: Path) -> None:
    path = corpus_path(clustered, ".clusters")
    for position in range(path.stat().st_size):
        content = flip(path, position, position % 8)
        with pytest.raises(InputError, match=r"train\.clusters: its content was altered"):
            Corpus.open(clustered)
        path.write_bytes(content)


def test_a_corpus_without_clusters_says_so(prefix: Path) -> None:
    corpus = Corpus.open(prefix)
    assert not corpus.has_clusters
    with pytest.raises(InputError, match=r"train: has no clusters: give `megaprot preprocess` a table"):
        _ = corpus.clusters


def test_importing_the_corpus_does_not_load_torch() -> None:
    program = "import sys, megaprot.pretrain.corpus; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
