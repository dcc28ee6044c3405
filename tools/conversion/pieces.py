"""SentencePiece models as the tokenizers library has them: byte-pair encoding, its pieces merged in the same order.

SentencePiece merges, of all neighbours that make a piece, those that make the piece of the highest score, the leftmost
first. A byte-pair model's scores are its ranks, 0, -1, -2, ..., so that a table of merges ordered by the rank of what
they make does the same. A unigram model compares sums of logarithms, which two libraries round differently.
"""

from __future__ import annotations

import base64
from typing import Any

from megaprot.common import sentencepiece_model
from megaprot.common.errors import InputError
from megaprot.common.vocabulary import Vocabulary


def model_of_pieces(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the ``model`` part of ``tokenizer.json`` for a SentencePiece vocabulary.

    Raises:
        InputError: The model is no byte-pair encoding.
    """
    special = set(vocabulary.special_ids)
    ordinary = [index for index in range(vocabulary.size) if index not in special]
    processor = sentencepiece_model.load(serialized(vocabulary))
    if [processor.get_score(index) for index in ordinary] != [-float(rank) for rank in range(len(ordinary))]:
        raise InputError(
            "the SentencePiece model of the checkpoint is no byte-pair encoding, the only kind whose pieces a "
            "tokenizer.json gives exactly; pretrain with a model of megaprot vocabulary to export it."
        )
    pieces = {vocabulary.tokens[index] for index in ordinary}
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in (vocabulary.tokens[index] for index in ordinary)
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.tokens[vocabulary.unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def serialized(vocabulary: Vocabulary) -> bytes:
    """Return the bytes of a vocabulary's SentencePiece model, as its file has them."""
    return base64.b64decode(vocabulary.model)
