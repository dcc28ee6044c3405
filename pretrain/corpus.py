"""The corpus on disk: residue ids in Megatron's indexed format, and a manifest beside them that guards it.

``<prefix>.bin`` holds the ids of all sequences back to back, one byte a residue (two where a SentencePiece vocabulary
has more than 256 tokens), without boundary tokens (the packer adds those). ``<prefix>.idx`` is megatron-core's index
(``megatron.core.datasets.indexed_dataset``): 9 bytes magic, version, type code, counts, then int32 lengths, int64 byte
offsets and int64 document ends, all little-endian, one document a sequence. ``<prefix>.clusters``, where the sequences
are clustered, holds int64 number of clusters, where each one's members start, and the members. ``<prefix>.json`` is the
manifest; docs/data.md lists its fields.

Megatron's own reader opens a truncated or altered file without a word; :class:`Corpus` does not.
"""

import hashlib
import json
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megaprot.common.errors import InputError
from megaprot.common.files import BLOCK_BYTES, sha256_of, write_json_atomically
from megaprot.common.sequence_readers.block import NO_FAMILY
from megaprot.common.vocabulary import Vocabulary

FORMAT = "megaprot-corpus"
FORMAT_VERSION = 2
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, number of sequences, of document ends
INDEX_VERSION = 1
TYPE_CODES = {np.dtype("<u1"): 1, np.dtype("<u2"): 8}  # of megatron-core's indexed datasets
LENGTH_EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # residues; the last bin is open
CHECK_BLOCK = 1 << 20  # sequences whose index entries are written or checked at a time
NO_CLUSTERS = np.empty(0, dtype=np.uint64)
REMEDY = "run `megaprot preprocess` again, or copy all of the corpus's files again"


def corpus_file(prefix: Path, suffix: str) -> Path:
    """Return ``<prefix><suffix>``; a dot inside the prefix's own name is kept."""
    return prefix.with_name(prefix.name + suffix)


class CorpusWriter:
    """Writes one corpus, one or many sequences at a time; memory grows by 4 bytes a sequence.

    The manifest is written last and atomically: without it :meth:`Corpus.open` refuses the files. Whoever does not come
    to call :meth:`finish` calls :meth:`close`.
    """

    def __init__(self, prefix: Path, vocabulary: Vocabulary) -> None:
        self.prefix = prefix
        self.vocabulary = vocabulary
        self.dtype = _stored_dtype(vocabulary)
        self.num_residues = 0
        self.families: Counter[int] = Counter()
        self._lengths = array("i")
        self._pending = bytearray()
        self._digest = hashlib.sha256()
        self._stream: IO[bytes] = open(corpus_file(prefix, ".bin"), "wb", buffering=0)  # noqa: SIM115 - see close()

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences added so far."""
        return len(self._lengths)

    def add(self, ids: npt.NDArray[Any], family: int = NO_FAMILY) -> None:
        """Append one sequence, ids [num_residues] of the vocabulary's type; ``family`` is its Pfam number if known."""
        self.add_block(ids, np.array([len(ids)], dtype=np.int32), np.array([family], dtype=np.int32))

    def add_block(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32], families: npt.NDArray[np.int32]) -> None:
        """Append sequences: ids [sum of lengths] of the vocabulary's type, ``lengths`` and ``families`` [n].

        Families are Pfam numbers, NO_FAMILY where none is known. Ids have no boundary tokens.

        Raises:
            ValueError: for ids of another type, an empty sequence, or lengths that do not add up.
        """
        if ids.dtype != self.dtype or not (lengths > 0).all() or lengths.sum(dtype=np.int64) != len(ids):
            raise ValueError(f"ids must be {self.dtype.name}, and all sequences non-empty")
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.num_residues += len(ids)
        self.families.update(count_families(families))
        if len(self._pending) + ids.nbytes < BLOCK_BYTES:
            self._pending += ids.tobytes()
            return
        self._flush()
        self._write(np.ascontiguousarray(ids))

    def finish(self, provenance: dict[str, Any], cluster_keys: npt.NDArray[np.uint64] = NO_CLUSTERS) -> None:
        """Write index, clusters and manifest; ``provenance`` (sources, settings) goes into the manifest as it is.

        Sequences of one cluster share their ``cluster_keys`` [num_sequences]; NO_CLUSTERS writes no table of clusters.

        Raises:
            ValueError: where no sequence was added.
        """
        if not self._lengths:
            raise ValueError("a corpus needs at least one sequence")
        self._flush()
        self.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        num_bytes = self.num_residues * self.dtype.itemsize
        files = {
            ".bin": {"num_bytes": num_bytes, "sha256": self._digest.hexdigest()},
            ".idx": _write_index(corpus_file(self.prefix, ".idx"), lengths, self.dtype),
        }
        if len(cluster_keys):
            files[".clusters"] = _write_clusters(corpus_file(self.prefix, ".clusters"), cluster_keys)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "vocabulary": self.vocabulary.to_dict(),
            "num_sequences": self.num_sequences,
            "num_residues": self.num_residues,
            "length_histogram": _length_histogram(lengths),
            "families": {f"PF{family:05d}": count for family, count in sorted(self.families.items())},
            **provenance,
            "files": files,
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json_atomically(corpus_file(self.prefix, ".json"), manifest)

    def close(self) -> None:
        """Close the ``.bin``; what was written stays unfinished."""
        self._stream.close()

    def _flush(self) -> None:
        self._write(np.frombuffer(self._pending, dtype=np.uint8))
        self._pending = bytearray()

    def _write(self, content: npt.NDArray[Any]) -> None:
        rest = content.data.cast("B") if len(content) else memoryview(b"")
        self._digest.update(rest)
        while len(rest):  # a raw stream may take a part only
            rest = rest[self._stream.write(rest) :]


def count_families(families: npt.NDArray[np.int32]) -> dict[int, int]:
    """Return {Pfam number: sequences} of ``families`` [n], without NO_FAMILY; quick where equal ones stand together."""
    if not len(families):
        return {}
    starts = np.flatnonzero(np.diff(families, prepend=families[0] - 1))
    run_lengths = np.diff(starts, append=len(families))
    numbers, inverse = np.unique(families[starts], return_inverse=True)
    counts = np.bincount(inverse, weights=run_lengths).astype(np.int64)
    return {number: count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True) if number >= 0}


def _stored_dtype(vocabulary: Vocabulary) -> np.dtype[Any]:
    """Return the type of the ids in a ``.bin``, little-endian."""
    return np.dtype(vocabulary.dtype).newbyteorder("<")


def _write_index(path: Path, lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> dict[str, Any]:
    num_sequences = len(lengths)
    blocks = [slice(start, start + CHECK_BLOCK) for start in range(0, num_sequences, CHECK_BLOCK)]

    def parts() -> Iterator[Any]:
        yield INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, TYPE_CODES[dtype], num_sequences, num_sequences + 1)
        yield lengths.astype("<i4").data
        end = 0
        for block in blocks:
            offsets = np.cumsum(np.concatenate(([end], lengths[block])), dtype=np.int64)
            yield (offsets[:-1] * dtype.itemsize).astype("<i8").data
            end = int(offsets[-1])
        for start in range(0, num_sequences + 1, CHECK_BLOCK):
            yield np.arange(start, min(start + CHECK_BLOCK, num_sequences + 1), dtype="<i8").data

    return _write_parts(path, parts())


def _write_clusters(path: Path, keys: npt.NDArray[np.uint64]) -> dict[str, Any]:
    members = np.argsort(keys, kind="stable")  # sequences of a cluster ascend
    keys = keys[members]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    head = np.concatenate(([len(starts)], starts, [len(keys)])).astype("<i8")
    return _write_parts(path, iter((head.data, members.astype("<i8", copy=False).data)))


def _write_parts(path: Path, parts: Iterator[Any]) -> dict[str, Any]:
    """Write buffers back to back; return the file's entry for the manifest."""
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for part in parts:
            digest.update(part)
            stream.write(part)
    return {"num_bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _length_histogram(lengths: npt.NDArray[np.int32]) -> dict[str, list[int]]:
    """Return counts by bin: sequences of ``edges[i] <= length < edges[i + 1]`` residues, the last bin open."""
    counts, _ = np.histogram(lengths, bins=[*LENGTH_EDGES, np.iinfo(np.int32).max])
    return {"edges": list(LENGTH_EDGES), "counts": counts.tolist()}


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of the manifest's canonical JSON without its field ``digest``, so that it can guard itself."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Corpus:
    """A corpus on disk, memory-mapped and read-only.

    Pickles as its prefix and manifest (a few kilobytes) and maps the files again on first use, for data-loader workers.
    """

    def __init__(self, prefix: Path, manifest: dict[str, Any]) -> None:
        self.prefix = prefix
        self.manifest = manifest
        self.vocabulary = Vocabulary.from_dict(manifest["vocabulary"])
        self.num_sequences: int = manifest["num_sequences"]
        self.num_residues: int = manifest["num_residues"]
        self.dtype = _stored_dtype(self.vocabulary)

    @classmethod
    def open(cls, prefix: Path) -> "Corpus":
        """Open ``<prefix>.bin``, ``.idx`` and ``.json`` after checking all that needs no pass over the residues.

        The manifest is held against its own digest, the other files against the sizes it states, the clusters against
        their checksum. The index needs no digest here: its lengths determine every other byte of it, and each is
        compared (0.1 s for 10 M sequences). What a flipped bit does to the ``.bin`` only :meth:`verify` can see.

        Raises:
            InputError: naming the file that is missing, empty, truncated, altered or of another version.
        """
        if prefix.is_dir():
            raise InputError(f"{prefix}: is a folder: name a split in it, such as {prefix / 'train'}.")
        manifest_path = corpus_file(prefix, ".json")
        manifest = _read_manifest(manifest_path)
        try:
            corpus = cls(prefix, manifest)
        except InputError as error:
            raise InputError(f"{manifest_path}: {error}") from None
        for suffix, stated in corpus.manifest["files"].items():
            _check_size(corpus_file(prefix, suffix), stated["num_bytes"])
        corpus._check_index()
        if corpus.has_clusters:
            corpus._check_sum(".clusters", sha256_of(corpus_file(prefix, ".clusters")))
        return corpus

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path, dict[str, Any]]]:
        return Corpus, (self.prefix, self.manifest)

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the ``.bin`` that the manifest states: the identity of the data."""
        return str(self.manifest["files"][".bin"]["sha256"])

    @cached_property
    def _index(self) -> npt.NDArray[np.uint8]:
        return _mapped(corpus_file(self.prefix, ".idx"))

    def _index_part(self, start: int, count: int, dtype: str) -> npt.NDArray[Any]:
        return np.frombuffer(self._index, dtype=dtype, count=count, offset=INDEX_HEADER.size + start)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Residues of each sequence, int32 [num_sequences], a read-only view of the mapped index."""
        return self._index_part(0, self.num_sequences, "<i4")

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each sequence starts in ``residues``, int64 [num_sequences], read-only.

        A view of the mapped index where ids have one byte; else 8 bytes of memory a sequence, as the index has bytes.
        """
        offsets = self._index_part(4 * self.num_sequences, self.num_sequences, "<i8")
        if self.dtype.itemsize > 1:
            offsets = offsets // self.dtype.itemsize
            offsets.flags.writeable = False
        return offsets

    @cached_property
    def residues(self) -> npt.NDArray[Any]:
        """The ids of all sequences back to back, [num_residues] of the vocabulary's type, read-only and mapped."""
        return _mapped(corpus_file(self.prefix, ".bin")).view(self.dtype)

    @property
    def has_clusters(self) -> bool:
        """Return whether the corpus has a table of clusters."""
        return ".clusters" in self.manifest["files"]

    @cached_property
    def clusters(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each cluster's members start, int64 [num_clusters + 1], and all members, int64 [num_sequences].

        Members are sequence numbers, ascending within a cluster. Both are read-only and mapped.

        Raises:
            InputError: where the corpus has none, see ``has_clusters``.
        """
        if not self.has_clusters:
            raise InputError(f"{self.prefix}: has no clusters: give `megaprot preprocess` a table as --split.clusters.")
        content = _mapped(corpus_file(self.prefix, ".clusters")).view("<i8")
        members_start = int(content[0]) + 2
        return content[1:members_start], content[members_start:]

    def sequence(self, index: int) -> npt.NDArray[Any]:
        """Return the ids of one sequence, [length], a view; IndexError outside 0 .. num_sequences - 1."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        start = int(self.offsets[index])
        return self.residues[start : start + int(self.lengths[index])]

    def verify(self) -> None:
        """Read all files whole: compare their checksums with the manifest, and the ids with the vocabulary's size.

        Raises:
            InputError: naming the file that was altered, or that holds ids the vocabulary does not have.
        """
        for suffix in self.manifest["files"]:
            if suffix != ".bin":
                self._check_sum(suffix, sha256_of(corpus_file(self.prefix, suffix)))
        digest, highest = hashlib.sha256(), 0
        block_items = max(1, BLOCK_BYTES // self.dtype.itemsize)
        for start in range(0, self.num_residues, block_items):
            block = self.residues[start : start + block_items]
            digest.update(block.data)
            highest = max(highest, int(block.max()))
        self._check_sum(".bin", digest.hexdigest())
        if highest >= self.vocabulary.size:
            raise InputError(
                f"{corpus_file(self.prefix, '.bin')}: holds the token id {highest}, but the vocabulary "
                f"'{self.vocabulary.name}' ends at {self.vocabulary.size - 1}: run `megaprot preprocess` again."
            )

    def verify_if_small(self, max_bytes: int = 1 << 30) -> bool:
        """Call :meth:`verify` where the ``.bin`` has at most ``max_bytes``; return whether it was called."""
        is_small: bool = self.manifest["files"][".bin"]["num_bytes"] <= max_bytes
        if is_small:
            self.verify()
        return is_small

    def _check_sum(self, suffix: str, sha256: str) -> None:
        if sha256 != self.manifest["files"][suffix]["sha256"]:
            path = corpus_file(self.prefix, suffix)
            raise InputError(f"{path}: its content was altered since it was written: {REMEDY}.")

    def _check_index(self) -> None:
        path = corpus_file(self.prefix, ".idx")
        expected = (INDEX_MAGIC, INDEX_VERSION, TYPE_CODES[self.dtype], self.num_sequences, self.num_sequences + 1)
        expected_bytes = INDEX_HEADER.size + 20 * self.num_sequences + 8
        if len(self._index) != expected_bytes or INDEX_HEADER.unpack_from(self._index.data) != expected:
            raise InputError(f"{path}: its header does not fit the manifest: {REMEDY}.")
        byte_offsets = self._index_part(4 * self.num_sequences, self.num_sequences, "<i8")
        document_ends = self._index_part(12 * self.num_sequences, self.num_sequences + 1, "<i8")
        end = 0
        for start in range(0, self.num_sequences, CHECK_BLOCK):
            lengths = self.lengths[start : start + CHECK_BLOCK]
            offsets = np.cumsum(np.concatenate(([end], lengths)), dtype=np.int64)
            numbers = np.arange(start, start + len(lengths))
            is_sound = (
                bool((lengths > 0).all())
                and np.array_equal(byte_offsets[start : start + CHECK_BLOCK], offsets[:-1] * self.dtype.itemsize)
                and np.array_equal(document_ends[start : start + len(lengths)], numbers)
            )
            if not is_sound:
                raise InputError(f"{path}: its entries contradict each other near sequence {start}: {REMEDY}.")
            end = int(offsets[-1])
        if end != self.num_residues or document_ends[-1] != self.num_sequences:
            raise InputError(f"{path}: its lengths do not add up to the residues of the manifest: {REMEDY}.")


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise InputError(f"{path}: cannot be read ({error}): {REMEDY}.") from None


def _check_size(path: Path, stated: int) -> None:
    if not path.is_file():
        raise InputError(f"{path}: is missing: {REMEDY}.")
    found = path.stat().st_size
    if found != stated:
        kind = "is empty" if not found else "is truncated" if found < stated else "is too long"
        raise InputError(f"{path}: {kind} ({found} bytes, the manifest states {stated}): {REMEDY}.")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest after checking that it is whole and of this format's version."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: is missing: name a corpus as FOLDER/train, or {REMEDY}.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): {REMEDY}.") from None
    if not text.strip():
        raise InputError(f"{path}: is empty: {REMEDY}.")
    try:
        manifest = json.loads(text)
    except ValueError:
        raise InputError(f"{path}: is truncated or damaged (not JSON): {REMEDY}.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: is not the manifest of a corpus: {REMEDY}.")
    if manifest.get("digest") != manifest_digest(manifest):
        raise InputError(f"{path}: was altered since it was written: {REMEDY}.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: is of format version {manifest['format_version']}, this version of megaprot reads "
            f"{FORMAT_VERSION}: run `megaprot preprocess` with this version."
        )
    return manifest
