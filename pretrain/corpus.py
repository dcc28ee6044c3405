"""The corpus on disk: residue ids in Megatron's indexed format, and a manifest beside them that guards it.

``<prefix>.bin`` holds the ids of all sequences back to back, one byte a residue, without boundary tokens (the packer
adds those). ``<prefix>.idx`` is megatron-core's index (``megatron.core.datasets.indexed_dataset``): 9 bytes magic,
version, type code, counts, then int32 lengths, int64 byte offsets and int64 document ends, all little-endian, one
document a sequence. ``<prefix>.json`` is the manifest; docs/data.md lists its fields.

Megatron's own reader opens a truncated or altered file without a word; :class:`Corpus` does not.
"""

import hashlib
import json
import struct
from array import array
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megaprot.common.errors import InputError
from megaprot.common.files import BLOCK_BYTES, write_json_atomically
from megaprot.common.vocabulary import Vocabulary

FORMAT = "megaprot-corpus"
FORMAT_VERSION = 1
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, number of sequences, of document ends
INDEX_VERSION = 1
UINT8_CODE = 1
LENGTH_EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # residues; the last bin is open
CHECK_BLOCK = 1 << 20  # sequences whose index entries are checked at a time
REMEDY = "run `megaprot preprocess` again, or copy the corpus's three files again"


def corpus_file(prefix: Path, suffix: str) -> Path:
    """Return ``<prefix><suffix>``; a dot inside the prefix's own name is kept."""
    return prefix.with_name(prefix.name + suffix)


class CorpusWriter:
    """Writes one corpus, sequence by sequence; memory grows by 4 bytes a sequence.

    The manifest is written last and atomically: without it :meth:`Corpus.open` refuses the files. Whoever does not come
    to call :meth:`finish` calls :meth:`close`.
    """

    def __init__(self, prefix: Path, vocabulary: Vocabulary) -> None:
        self.prefix = prefix
        self.vocabulary = vocabulary
        self.num_residues = 0
        self.families: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self._lengths = array("i")
        self._pending = bytearray()
        self._digest = hashlib.sha256()
        self._stream: IO[bytes] = open(corpus_file(prefix, ".bin"), "wb", buffering=0)  # noqa: SIM115 - see close()

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences added so far."""
        return len(self._lengths)

    def add(self, ids: npt.NDArray[np.uint8], family: str = "") -> None:
        """Append one sequence, uint8 ids [num_residues] without boundary tokens; ``family`` is counted when known."""
        if ids.dtype != np.uint8 or not len(ids):
            raise ValueError("ids must be a non-empty uint8 array")
        self._lengths.append(len(ids))
        self.num_residues += len(ids)
        if family:
            self.families[family] += 1
        self._pending += ids.tobytes()
        if len(self._pending) >= BLOCK_BYTES:
            self._flush()

    def finish(self, provenance: dict[str, Any]) -> None:
        """Write the index and the manifest; ``provenance`` (sources, split settings) goes into the manifest as it is.

        Raises:
            ValueError: where no sequence was added.
        """
        if not self._lengths:
            raise ValueError("a corpus needs at least one sequence")
        self._flush()
        self.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        files = {
            ".bin": {"num_bytes": self.num_residues, "sha256": self._digest.hexdigest()},
            ".idx": _write_index(corpus_file(self.prefix, ".idx"), lengths),
        }
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "vocabulary": self.vocabulary.to_dict(),
            "num_sequences": self.num_sequences,
            "num_residues": self.num_residues,
            "length_histogram": _length_histogram(lengths),
            "changes": dict(sorted(self.changes.items())),
            "families": dict(sorted(self.families.items())),
            **provenance,
            "files": files,
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json_atomically(corpus_file(self.prefix, ".json"), manifest)

    def close(self) -> None:
        """Close the ``.bin``; what was written stays unfinished."""
        self._stream.close()

    def _flush(self) -> None:
        self._digest.update(self._pending)
        self._stream.write(self._pending)
        self._pending.clear()


def _write_index(path: Path, lengths: npt.NDArray[np.int32]) -> dict[str, Any]:
    num_sequences = len(lengths)
    offsets = np.zeros(num_sequences, dtype=np.int64)
    np.cumsum(lengths[:-1], out=offsets[1:])
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, UINT8_CODE, num_sequences, num_sequences + 1)
    document_ends = np.arange(num_sequences + 1, dtype="<i8")
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for part in (header, lengths.astype("<i4").data, offsets.astype("<i8").data, document_ends.data):
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

    @classmethod
    def open(cls, prefix: Path) -> "Corpus":
        """Open ``<prefix>.bin``, ``.idx`` and ``.json`` after checking all that needs no pass over the residues.

        The manifest is held against its own digest, both other files against the sizes it states. The index needs no
        digest here: its lengths determine every other byte of it, and each is compared (0.1 s for 10 M sequences).
        What a flipped bit does to the ``.bin`` only :meth:`verify` can see.

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
        """Where each sequence starts in ``residues``, int64 [num_sequences], a read-only view of the mapped index."""
        return self._index_part(4 * self.num_sequences, self.num_sequences, "<i8")

    @cached_property
    def residues(self) -> npt.NDArray[np.uint8]:
        """The ids of all sequences back to back, uint8 [num_residues], read-only and mapped."""
        return _mapped(corpus_file(self.prefix, ".bin"))

    def sequence(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the ids of one sequence, uint8 [length], a view; IndexError outside 0 .. num_sequences - 1."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        start = int(self.offsets[index])
        return self.residues[start : start + int(self.lengths[index])]

    def verify(self) -> None:
        """Read both files whole: compare their checksums with the manifest, and the ids with the vocabulary's size.

        Raises:
            InputError: naming the file that was altered, or that holds ids the vocabulary does not have.
        """
        for suffix, stated in self.manifest["files"].items():
            path, digest, highest = corpus_file(self.prefix, suffix), hashlib.sha256(), 0
            content = self.residues if suffix == ".bin" else self._index
            for start in range(0, len(content), BLOCK_BYTES):
                block = content[start : start + BLOCK_BYTES]
                digest.update(block.data)
                highest = max(highest, int(block.max()))
            if digest.hexdigest() != stated["sha256"]:
                raise InputError(f"{path}: its content was altered since it was written: {REMEDY}.")
            if suffix == ".bin" and highest >= self.vocabulary.size:
                raise InputError(
                    f"{path}: holds the token id {highest}, but the vocabulary '{self.vocabulary.name}' ends at "
                    f"{self.vocabulary.size - 1}: run `megaprot preprocess` again."
                )

    def verify_if_small(self, max_bytes: int = 1 << 30) -> bool:
        """Call :meth:`verify` where the ``.bin`` has at most ``max_bytes``; return whether it was called."""
        is_small = self.num_residues <= max_bytes
        if is_small:
            self.verify()
        return is_small

    def _check_index(self) -> None:
        path = corpus_file(self.prefix, ".idx")
        expected = (INDEX_MAGIC, INDEX_VERSION, UINT8_CODE, self.num_sequences, self.num_sequences + 1)
        expected_bytes = INDEX_HEADER.size + 20 * self.num_sequences + 8
        if len(self._index) != expected_bytes or INDEX_HEADER.unpack_from(self._index.data) != expected:
            raise InputError(f"{path}: its header does not fit the manifest: {REMEDY}.")
        document_ends = self._index_part(12 * self.num_sequences, self.num_sequences + 1, "<i8")
        end = 0
        for start in range(0, self.num_sequences, CHECK_BLOCK):
            lengths = self.lengths[start : start + CHECK_BLOCK]
            offsets = np.cumsum(np.concatenate(([end], lengths)), dtype=np.int64)
            numbers = np.arange(start, start + len(lengths))
            is_sound = (
                bool((lengths > 0).all())
                and np.array_equal(self.offsets[start : start + CHECK_BLOCK], offsets[:-1])
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
