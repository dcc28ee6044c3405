"""Amino-acid vocabularies and the encoding of a sequence's letters into their ids.

Three vocabularies are known: ``esm`` (ESM-2's 33 tokens, Lin et al. 2023), ``iupac`` (TAPE's 30, Rao et al. 2019) and
``proteinlm`` (ProteinLM's 31, Xiao et al. 2021). One letter policy holds for all, see :meth:`Vocabulary.encode`.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from string import ascii_letters, ascii_lowercase
from typing import Any

import numpy as np
import numpy.typing as npt

from megaprot.common.errors import InputError

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
GAPS_AND_STOPS = b"*-."
WHITESPACE = b" \t\r\n\v\f"
UNTRANSLATED = 0xFF  # no vocabulary of one byte an id may use it


class BadSequence(ValueError):
    """A sequence that cannot be encoded; the text is a clause such as ``holds '7' at position 12``."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a protein language model; a token's id is its place in ``tokens``.

    ``begin`` is put before each sequence and ``end`` after it; ``end`` is -1 where sequences get no end token.
    ``standard_residues`` holds the ids of the 20 residues in alphabetical order of their letters.
    """

    name: str
    tokens: tuple[str, ...]
    pad: int
    mask: int
    begin: int
    end: int
    unknown: int
    standard_residues: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of tokens, before any padding of the embedding."""
        return len(self.tokens)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens that stand for no letter (``<cls>``, ``[unused1]``, ...), ascending."""
        return tuple(index for index, token in enumerate(self.tokens) if len(token) > 1)

    @property
    def num_boundary_tokens(self) -> int:
        """Return how many tokens a sequence gains when it is packed: 2 with an end token, else 1."""
        return 1 if self.end < 0 else 2

    @cached_property
    def _letter_ids(self) -> dict[str, int]:
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

    def encode(self, residues: bytes) -> tuple[npt.NDArray[np.uint8], Counter[str]]:
        """Return the ids of a sequence, uint8 [num_residues] without boundary tokens, and what was changed, by kind.

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
        return np.frombuffer(translated, dtype=np.uint8), changes

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
            InputError: where the name is unknown or the tokens or ids are not those of the vocabulary of that name.
        """
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
        standard_residues=tuple(listed.index(letter) for letter in STANDARD_RESIDUES),
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
    """Return the vocabulary of that name.

    Raises:
        InputError: for an unknown name; the text lists the known ones.
    """
    if name not in VOCABULARIES:
        raise InputError(f"unknown vocabulary '{name}': choose one of {', '.join(VOCABULARIES)}.")
    return VOCABULARIES[name]
