"""Amino-acid vocabularies and the encoding of a sequence's letters into their ids.

Three vocabularies of letters are known: ``esm`` (ESM-2's 33 tokens, Lin et al. 2023), ``iupac`` (TAPE's 30, Rao et al.
2019) and ``proteinlm`` (ProteinLM's 31, Xiao et al. 2021). A SentencePiece model, whose tokens are pieces of several
residues, is a vocabulary too. One letter policy holds for all, see :meth:`Vocabulary.encode`.
"""

import base64
import binascii
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from string import ascii_letters, ascii_lowercase
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from megaprot.common import sentencepiece_model
from megaprot.common.errors import InputError

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
GAPS_AND_STOPS = b"*-."
WHITESPACE = b" \t\r\n\v\f"
UNTRANSLATED = 0xFF  # no letter's id or code
SENTENCEPIECE = "sentencepiece"
MODEL_SUFFIX = ".model"


class BadSequence(ValueError):
    """A sequence that cannot be encoded; the text is a clause such as ``holds '7' at position 12``."""


@dataclass(frozen=True)
class EncodedBlock:
    """Many encoded sequences.

    Sequence i is ``ids[bounds[i] : bounds[i + 1]]``, ``bounds`` int64 [num_kept + 1], and was record ``kept[i]`` of the
    input, ``kept`` int64 [num_kept] ascending. ``changes`` counts what was changed, by kind; ``bad`` holds the records
    left out, each (number, clause such as ``holds '7' at position 12``).
    """

    ids: npt.NDArray[np.unsignedinteger]
    bounds: npt.NDArray[np.int64]
    kept: npt.NDArray[np.int64]
    changes: Counter[str]
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a protein language model; a token's id is its place in ``tokens``.

    ``begin`` is put before each sequence and ``end`` after it; ``end`` is -1 where sequences get no end token.
    ``replacements`` holds the ids that masking draws random replacements from: the 20 residues in alphabetical order of
    their letters, or the pieces of nothing but these. ``model`` is a serialized SentencePiece model in base 64, empty
    for a vocabulary of letters.
    """

    name: str
    tokens: tuple[str, ...]
    pad: int
    mask: int
    begin: int
    end: int
    unknown: int
    replacements: tuple[int, ...]
    model: str = ""

    @property
    def size(self) -> int:
        """Return the number of tokens, before any padding of the embedding."""
        return len(self.tokens)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens that stand for no letter (``<cls>``, ``[unused1]``, ...), ascending."""
        return tuple(index for index, token in enumerate(self.tokens) if token[0] in "<[")

    @property
    def num_boundary_tokens(self) -> int:
        """Return how many tokens a sequence gains when it is packed: 2 with an end token, else 1."""
        return 1 if self.end < 0 else 2

    @property
    def is_per_residue(self) -> bool:
        """Tell whether each residue is a token of its own."""
        return not self.model

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Return the smallest type that holds every id: uint8 or uint16."""
        return np.uint8 if self.size <= 256 else np.uint16

    def require_per_residue(self, what: str) -> None:
        """Raise InputError where a residue is no token of its own; ``what`` needs that, and begins the sentence."""
        if not self.is_per_residue:
            raise InputError(
                f"{what} needs one token a residue, which the vocabulary {self.name} does not have: preprocess with "
                f"--vocabulary {' or '.join(VOCABULARIES)}."
            )

    @property
    def letter_table(self) -> bytes:
        """256 entries for ``bytes.translate``: the letter of each id of one, else X, in a vocabulary of letters."""
        self.require_per_residue("Turning ids into letters")
        table = bytearray(b"X" * 256)
        for letter, index in self._letter_ids.items():
            table[index] = ord(letter)
        return bytes(table)

    @cached_property
    def _processor(self) -> Any:
        """The SentencePieceProcessor of ``model``."""
        return sentencepiece_model.load(base64.b64decode(self.model))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: what is cached can be made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _letter_ids(self) -> dict[str, int]:
        """The id of each letter; with pieces its ASCII code, since they are cut from text that follows the policy."""
        if not self.is_per_residue:
            return {letter: ord(letter) for letter in sentencepiece_model.RESIDUE_LETTERS}
        return {token: index for index, token in enumerate(self.tokens) if len(token) == 1 and token.isalpha()}

    @cached_property
    def _exact_table(self) -> bytes:
        """256 entries for ``bytes.translate``: the id of each of the vocabulary's letters, else UNTRANSLATED."""
        table = bytearray([UNTRANSLATED] * 256)
        for letter, index in self._letter_ids.items():
            table[ord(letter)] = index
        return bytes(table)

    @cached_property
    def _lenient_table(self) -> bytes:
        """As the exact table, with X's id in place of UNTRANSLATED."""
        return self._exact_table.replace(bytes([UNTRANSLATED]), bytes([self._letter_ids["X"]]))

    def encode(self, residues: bytes) -> tuple[npt.NDArray[np.unsignedinteger], Counter[str]]:
        """Return the ids of a sequence, ``dtype`` [num_tokens] without boundary tokens, and what was changed, by kind.

        White space is removed and lower case upper-cased; ``*`` and the gaps ``-`` and ``.`` are dropped at both ends
        and become X inside; letters the vocabulary lacks (J) become X. The kinds counted are ``upper_cased``,
        ``whitespace_removed``, ``dropped_<character>`` and ``replaced_<character>``, in residues.

        Raises:
            BadSequence: for any other character, and where no residue is left.
        """
        translated = residues.translate(self._exact_table)
        changes: Counter[str] = Counter()
        if UNTRANSLATED in translated:  # rare: nearly all sequences are clean and need no second look
            translated, changes = self._encode_leniently(residues)
        if not translated:
            raise BadSequence("has no residues")
        if self.is_per_residue:
            return np.frombuffer(translated, dtype=np.uint8), changes
        return np.array(self._processor.encode(translated.decode()), dtype=self.dtype), changes

    def encode_block(self, letters: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int64]) -> EncodedBlock:
        """Encode many records at once, each as :meth:`encode` does; record i is ``letters[bounds[i] : bounds[i + 1]]``.

        Clean records, nearly all, cost one pass of native code; the others are taken one by one.
        """
        letters, bounds = letters[bounds[0] : bounds[-1]], bounds - bounds[0]
        ids, has_untranslated = _translate(letters, np.frombuffer(self._exact_table, dtype=np.uint8))
        lengths = np.diff(bounds)
        is_clean = _clean_records(ids, bounds) if has_untranslated else lengths > 0
        changes: Counter[str] = Counter()
        bad: list[tuple[int, str]] = []
        parts, start = [], 0
        for record in np.flatnonzero(~is_clean).tolist():
            try:
                encoded, changed = self._encode_leniently(letters[bounds[record] : bounds[record + 1]].tobytes())
                if not encoded:
                    raise BadSequence("has no residues")
                changes.update(changed)
            except BadSequence as error:
                bad.append((record, str(error)))
                encoded = b""
            parts += [ids[start : bounds[record]], np.frombuffer(encoded, dtype=np.uint8)]
            lengths[record], start = len(encoded), bounds[record + 1]
        ids = np.concatenate([*parts, ids[start:]]) if parts else ids
        kept = np.flatnonzero(lengths)
        new_bounds = np.concatenate(([0], np.cumsum(lengths[kept])))
        if not self.is_per_residue:
            ids, new_bounds = self._pieces(ids, new_bounds)
        return EncodedBlock(ids, new_bounds, kept, changes, bad)

    def _pieces(
        self, letters: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
        """Return the ids and bounds of the pieces that sequences of plain letters are cut into."""
        text = letters.tobytes().decode()
        limits = bounds.tolist()
        sequences = [text[start:end] for start, end in pairwise(limits)]
        pieces = self._processor.encode(sequences, num_threads=1) if sequences else []
        new_bounds = np.zeros(len(bounds), dtype=np.int64)
        np.cumsum([len(ids) for ids in pieces], out=new_bounds[1:])
        return np.fromiter(chain.from_iterable(pieces), dtype=self.dtype, count=new_bounds[-1]), new_bounds

    def _encode_leniently(self, residues: bytes) -> tuple[bytes, Counter[str]]:
        letters = residues.translate(None, WHITESPACE)
        upper = letters.upper()
        core = upper.strip(GAPS_AND_STOPS)
        bad = core.translate(None, ascii_letters.encode() + GAPS_AND_STOPS)
        if bad:
            raise BadSequence(f"holds {_shown(bad[0])} at position {letters.index(bad[:1]) + 1}")
        changes = Counter(
            whitespace_removed=len(residues) - len(letters),
            upper_cased=len(letters) - len(letters.translate(None, ascii_lowercase.encode())),
        )
        for code in GAPS_AND_STOPS:
            changes[f"dropped_{chr(code)}"] = upper.count(code) - core.count(code)
        for code in set(core):
            if chr(code) not in self._letter_ids:
                changes[f"replaced_{chr(code)}"] = core.count(code)
        return core.translate(self._lenient_table), +changes  # unary plus keeps the positive counts only

    def to_dict(self) -> dict[str, Any]:
        """Return the vocabulary as JSON can hold it, for manifests and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Vocabulary":
        """Return the vocabulary that :meth:`to_dict` wrote.

        Raises:
            InputError: where the name is unknown, the model damaged, or the tokens or ids are not those that belong to
                the name or the model.
        """
        if values.get("name") == SENTENCEPIECE:
            try:
                model = base64.b64decode(str(values.get("model")), validate=True)
            except binascii.Error:
                model = b""
            vocabulary = _sentencepiece_vocabulary(model)
        else:
            vocabulary = get_vocabulary(str(values.get("name", "")))
        if values != vocabulary.to_dict():
            raise InputError(
                f"the recorded vocabulary '{vocabulary.name}' does not have the tokens and ids of this version's "
                f"'{vocabulary.name}': use the version of megaprot that wrote it, or preprocess the sequences again."
            )
        return vocabulary


def _shown(code: int) -> str:
    return repr(chr(code)) if 0x20 <= code < 0x7F else f"the byte 0x{code:02x}"


def _vocabulary(name: str, tokens: str, pad: str, mask: str, begin: str, end: str, unknown: str) -> Vocabulary:
    listed = tuple(tokens.split())
    return Vocabulary(
        name=name,
        tokens=listed,
        pad=listed.index(pad),
        mask=listed.index(mask),
        begin=listed.index(begin),
        end=listed.index(end) if end else -1,
        unknown=listed.index(unknown),
        replacements=tuple(listed.index(letter) for letter in STANDARD_RESIDUES),
    )


VOCABULARIES = {
    "esm": _vocabulary(
        "esm",
        "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>",
        pad="<pad>", mask="<mask>", begin="<cls>", end="<eos>", unknown="<unk>",
    ),
    "iupac": _vocabulary(
        "iupac",
        "<pad> <mask> <cls> <sep> <unk> A B C D E F G H I K L M N O P Q R S T U V W X Y Z",
        pad="<pad>", mask="<mask>", begin="<cls>", end="<sep>", unknown="<unk>",
    ),
    # ProteinLM packs "[CLS] sequence [CLS] sequence ...": [SEP] is in the vocabulary and never in a row.
    "proteinlm": _vocabulary(
        "proteinlm",
        "[PAD] [MASK] [CLS] [SEP] [UNK] [unused1] A B C D E F G H I K L M N O P Q R S T U V W X Y Z",
        pad="[PAD]", mask="[MASK]", begin="[CLS]", end="", unknown="[UNK]",
    ),
}  # fmt: skip


def get_vocabulary(name: str) -> Vocabulary:
    """Return the vocabulary of that name, or that of the SentencePiece model in the file ``*.model`` of that name.

    Raises:
        InputError: for an unknown name (the text lists the known ones) and for a model that is missing or unfit.
    """
    if name.endswith(MODEL_SUFFIX):
        try:
            return _sentencepiece_vocabulary(Path(name).read_bytes())
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror}): name a SentencePiece model.") from None
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if name not in VOCABULARIES:
        raise InputError(
            f"unknown vocabulary '{name}': choose one of {', '.join(VOCABULARIES)}, or name a SentencePiece model, "
            f"a file that ends with {MODEL_SUFFIX}."
        )
    return VOCABULARIES[name]


def _sentencepiece_vocabulary(model: bytes) -> Vocabulary:
    """Return the vocabulary of a serialized SentencePiece model."""
    processor = sentencepiece_model.load(model)
    tokens = tuple(processor.id_to_piece(index) for index in range(processor.get_piece_size()))
    return Vocabulary(
        name=SENTENCEPIECE,
        tokens=tokens,
        pad=tokens.index(sentencepiece_model.PAD),
        mask=tokens.index(sentencepiece_model.MASK),
        begin=tokens.index(sentencepiece_model.BEGIN),
        end=tokens.index(sentencepiece_model.END),
        unknown=tokens.index(sentencepiece_model.UNKNOWN),
        replacements=tuple(index for index, token in enumerate(tokens) if set(token) <= set(STANDARD_RESIDUES)),
        model=base64.b64encode(model).decode(),
    )


@numba.njit(cache=True, nogil=True)
def _translate(letters: npt.NDArray[np.uint8], table: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], bool]:
    """Return ``table`` of each letter, and whether UNTRANSLATED, the only value above 127, is among them.

    Native: numpy's indexing by uint8 first widens the indices to int64.
    """
    ids = np.empty(len(letters), dtype=np.uint8)
    all_bits = np.uint8(0)
    for place in range(len(letters)):
        index = table[letters[place]]
        ids[place] = index
        all_bits |= index
    return ids, bool(all_bits > 127)


@numba.njit(cache=True, nogil=True)
def _clean_records(ids: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which records, ``ids[bounds[i] : bounds[i + 1]]``, have no UNTRANSLATED among them and are not empty."""
    is_clean = np.empty(len(bounds) - 1, dtype=np.bool_)
    for record in range(len(is_clean)):
        is_clean[record] = bounds[record + 1] > bounds[record]
        for place in range(bounds[record], bounds[record + 1]):
            if ids[place] == UNTRANSLATED:
                is_clean[record] = False
                break
    return is_clean
