"""Tokenizer files that ``AutoTokenizer`` loads and that tokenize as :meth:`Vocabulary.encode` does, and back.

``tokenizer.json`` (the format of the tokenizers library) does in its normaliser what ``encode`` does: white space goes,
lower case becomes upper case, gaps and stops go at both ends and become X inside, as letters do that the vocabulary
lacks. Where ``encode`` refuses a sequence (digits, say), the tokenizer gives the unknown token. What is left is cut
into letters, or into the pieces of a SentencePiece model, whose file travels beside.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.files import write_json_atomically
from megaprot.common.sentencepiece_model import MODEL_FILE
from megaprot.common.vocabulary import VOCABULARIES, Vocabulary, get_vocabulary
from megaprot.tools.conversion.hugging_face_config import read_json
from megaprot.tools.conversion.pieces import model_of_pieces, serialized

_UNLIMITED = 1_000_000_000
_EACH_LETTER = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _normaliser(vocabulary: Vocabulary) -> dict[str, Any]:
    letters = {token for token in vocabulary.tokens if len(token) == 1}  # each is a piece of a SentencePiece model too
    lacking = "".join(letter for letter in ascii_uppercase if letter not in letters)
    steps = [_replace({"Regex": r"[ \t\r\n\x0b\x0c]+"}, "")]
    steps += [_replace({"String": letter}, letter.upper()) for letter in ascii_lowercase]
    steps += [_replace({"Regex": r"\A[*.\-]+|[*.\-]+\z"}, ""), _replace({"Regex": rf"[*.\-{lacking}]"}, "X")]
    return {"type": "Sequence", "normalizers": steps}


def _template(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the post-processor: boundary tokens around one sequence, or around each of two, all of one type."""

    def special(index: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": vocabulary.tokens[index], "type_id": 0}}] if index >= 0 else []

    def sequence(name: str) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": name, "type_id": 0}}]

    begin, end = special(vocabulary.begin), special(vocabulary.end)
    # As EsmTokenizer joins a pair: <cls> A <eos> B <eos>; without an end token each sequence has its own beginning.
    second = sequence("B") + end if end else begin + sequence("B")
    used = {vocabulary.tokens[index]: index for index in (vocabulary.begin, vocabulary.end) if index >= 0}
    return {
        "type": "TemplateProcessing",
        "single": begin + sequence("A") + end,
        "pair": begin + sequence("A") + end + second,
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in used.items()},
    }


def _named_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    tokens = vocabulary.tokens
    named = {"unk_token": vocabulary.unknown, "pad_token": vocabulary.pad, "mask_token": vocabulary.mask}
    named["cls_token"] = vocabulary.begin
    if vocabulary.end >= 0:
        named |= {"eos_token": vocabulary.end, "sep_token": vocabulary.end}
    return {name: tokens[index] for name, index in named.items()}


def _model_of_letters(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "type": "WordLevel",
        "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
        "unk_token": vocabulary.tokens[vocabulary.unknown],
    }


def write_tokenizer(vocabulary: Vocabulary, folder: Path, num_positions: int) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``, and a SentencePiece model.

    Args:
        vocabulary: The tokens.
        folder: Where to.
        num_positions: Longest sequence in tokens; 0 for any length.

    Raises:
        InputError: The vocabulary is a SentencePiece model of another kind than byte-pair encoding.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": index, "content": vocabulary.tokens[index], **flags} for index in vocabulary.special_ids]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normaliser(vocabulary),
        "pre_tokenizer": _EACH_LETTER if vocabulary.is_per_residue else None,
        "post_processor": _template(vocabulary),
        "decoder": {"type": "Fuse"},
        "model": _model_of_letters(vocabulary) if vocabulary.is_per_residue else model_of_pieces(vocabulary),
    }
    if not vocabulary.is_per_residue:
        (folder / MODEL_FILE).write_bytes(serialized(vocabulary))
    named = _named_tokens(vocabulary)
    config = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": num_positions or _UNLIMITED,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    write_json_atomically(folder / "tokenizer.json", tokenizer)
    write_json_atomically(folder / "tokenizer_config.json", config)
    write_json_atomically(folder / "special_tokens_map.json", named)


def _listed_tokens(folder: Path) -> dict[int, str]:
    """Return {id: token} of a Hugging Face tokenizer; empty where the folder has none that lists its tokens."""
    if (folder / "tokenizer.json").is_file():
        values = read_json(folder / "tokenizer.json")
        try:
            tokens = {int(index): token for token, index in dict(values["model"]["vocab"]).items()}
            return tokens | {int(added["id"]): added["content"] for added in values.get("added_tokens", [])}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / 'tokenizer.json'} lists no tokens ({error}); restore it.") from error
    if (folder / "vocab.txt").is_file():
        return dict(enumerate((folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")))
    return {}


def read_vocabulary(folder: Path, name: str) -> Vocabulary:
    """Return the vocabulary of a Hugging Face folder: ours with exactly its tokens, or ``name`` if it lists none.

    Args:
        folder: The folder; its SentencePiece model is taken where it has one.
        name: Name of a vocabulary or file of a SentencePiece model; empty for none given.

    Raises:
        InputError: The tokens are those of none of ours, or of another than ``name``; or neither is there.
    """
    listed = _listed_tokens(folder)
    beside = str(folder / MODEL_FILE) if (folder / MODEL_FILE).is_file() else ""
    known = [get_vocabulary(name or beside)] if name or beside else list(VOCABULARIES.values())
    if not listed:
        if len(known) == 1:
            return known[0]
        raise InputError(
            f"{folder} has no tokenizer files that list its tokens; copy them there, or name the vocabulary with "
            f"--vocabulary ({', '.join(VOCABULARIES)})."
        )
    tokens = tuple(listed[index] for index in sorted(listed))
    for vocabulary in known:
        if vocabulary.tokens == tokens:
            return vocabulary
    wanted = name or beside or ", ".join(VOCABULARIES)
    raise InputError(
        f"the {len(tokens)} tokens of the tokenizer in {folder} are not those of {wanted}; give another model, or name "
        "its vocabulary or SentencePiece model with --vocabulary."
    )
