"""From a Hugging Face tokenizer to the table of residue ids it stands for, and a protein's ids by it.

Asking a tokenizer for each sequence is slow (ESM's takes 4 microseconds a residue) and each model wants its text in
another form. Here the tokenizer is asked once for each letter, and the table replaces it.
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import STANDARD_RESIDUES, UNTRANSLATED, BadSequence, Vocabulary

_RARE = "UZOB"
"""Letters that models which want spaces between residues were trained without: X stands for them (ProtBert)."""


def vocabulary_of(tokenizer: Any, folder: str) -> Vocabulary:
    """Return the letters, boundary tokens and mask of a transformers tokenizer that has one token a residue.

    ESM's tokenizers and ours take plain text. BERT's words need spaces between residues; such models (ProtBert) know
    U, Z, O and B as X. Where there is no X, the unknown token stands for it.

    Args:
        tokenizer: The tokenizer.
        folder: Named in messages.

    Raises:
        InputError: The tokenizer has no tokens of single residues, or puts others around a sequence than one before it
            and at most one after it.
    """
    unknown = tokenizer.unk_token_id
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in ascii_uppercase}
    ids = {letter: index for letter, index in ids.items() if index is not None and index != unknown}
    lacking = [letter for letter in STANDARD_RESIDUES if letter not in ids]
    if lacking or unknown is None:
        raise InputError(f"the tokenizer of {folder} has no token for {''.join(lacking) or 'unknown letters'}; name "
                         "a protein model with one token a residue.")  # fmt: skip
    if max(*ids.values(), unknown) >= UNTRANSLATED:
        raise InputError(f"the tokenizer of {folder} has {len(tokenizer)} tokens; name a protein model with one token "
                         "a residue.")  # fmt: skip
    separator, begin, end = _boundaries(tokenizer, ids, folder)
    if separator and "X" in ids:
        ids = {letter: index for letter, index in ids.items() if letter not in _RARE}
    ids.setdefault("X", unknown)
    letters = {index: letter for letter, index in ids.items()}
    highest = max(*letters, unknown, begin, end, tokenizer.pad_token_id, _mask_id(tokenizer))
    return Vocabulary(
        name=folder,
        tokens=tuple(letters.get(index, f"<{index}>") for index in range(highest + 1)),
        pad=tokenizer.pad_token_id,
        mask=_mask_id(tokenizer),
        begin=begin,
        end=end,
        unknown=unknown,
        replacements=tuple(ids[letter] for letter in STANDARD_RESIDUES),
    )


def _mask_id(tokenizer: Any) -> int:
    """Return the id of the mask token, -1 where there is none."""
    return -1 if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id)


def _boundaries(tokenizer: Any, ids: dict[str, int], folder: str) -> tuple[str, int, int]:
    """Return what separates residues in the tokenizer's text, and the ids before and after a sequence (-1: none)."""
    letters = [*ids, *reversed(ids)]
    expected = [ids[letter] for letter in letters]
    for separator in ("", " "):
        found = list(tokenizer(separator.join(letters))["input_ids"])
        if found[1 : 1 + len(expected)] == expected and len(found) - len(expected) in (1, 2):
            return separator, found[0], found[-1] if len(found) - len(expected) == 2 else -1
    raise InputError(
        f"the tokenizer of {folder} does not turn residues into one token each between a first and a last one; name a "
        "protein model that does."
    )


def encode(vocabulary: Vocabulary, sequence: bytes) -> NDArray[np.unsignedinteger]:
    """Return the ids of a protein's residues [num_residues] without boundary tokens, of pieces where those are tokens.

    The letters' rules are :meth:`Vocabulary.encode`'s.

    Raises:
        BadSequence: The sequence cannot be encoded, or the model knows fewer than half of its letters.
    """
    residues, changes = vocabulary.encode(sequence)
    num_unknown = sum(count for kind, count in changes.items() if kind.startswith("replaced_"))
    if vocabulary.tokens[vocabulary.unknown] == "X":
        num_unknown = int((residues == vocabulary.unknown).sum())
    num_letters = len(residues) if vocabulary.is_per_residue else len(sequence)
    if 2 * num_unknown > num_letters:
        raise BadSequence(f"would turn into unknown tokens for the most part ({num_unknown} of {num_letters})")
    return residues
