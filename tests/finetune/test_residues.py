"""Residue ids against the tokenizers they stand for."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import STANDARD_RESIDUES, VOCABULARIES, BadSequence
from megaprot.finetune.residues import encode, vocabulary_of
from megaprot.tools.conversion.tokenizer import write_tokenizer
from tests.finetune.folders import bert_folder, esm_folder

LETTERS = st.text("ACDEFGHIKLMNPQRSTVWYXBZUO", min_size=4, max_size=30)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a tokenizer each: ESM's, ProtBert's and ours."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {"EsmTokenizer": esm_folder(folder / "esm"), "ProtBert": bert_folder(folder / "bert")}
    for name, vocabulary in VOCABULARIES.items():
        found[name] = folder / f"ours_{name}"
        found[name].mkdir()
        write_tokenizer(vocabulary, found[name], 0)
        (found[name] / "config.json").write_text('{"model_type": "bert"}')
    return found


@pytest.mark.parametrize("name", ["EsmTokenizer", "ProtBert", *VOCABULARIES])
def test_ids_are_the_tokenizers(name: str, tokenizers: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers[name])
    vocabulary = vocabulary_of(tokenizer, name)

    @given(text=LETTERS)
    def check(text: str) -> None:
        if name == "ProtBert":  # its model card says how its input is written
            known = " ".join("X" if letter in "UZOB" else letter for letter in text)
        else:
            known = text
        try:
            ids = encode(vocabulary, text.encode())
        except BadSequence:
            return  # mostly X
        end = [vocabulary.end] if vocabulary.end >= 0 else []
        assert [vocabulary.begin, *ids.tolist(), *end] == tokenizer(known)["input_ids"]

    check()
    assert (vocabulary.pad, vocabulary.mask) == (tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert tokenizer.convert_ids_to_tokens(list(vocabulary.replacements)) == list("ACDEFGHIKLMNPQRSTVWY")


def test_lower_case_gaps_and_stops_follow_the_policy_of_preprocessing(tokenizers: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(tokenizers["EsmTokenizer"]), "esm")
    for text in (b"mkvla", b"MKVLA*", b"--MKVLA", b"MKV LA"):
        assert encode(vocabulary, text).tolist() == encode(vocabulary, b"MKVLA").tolist()
    expected, _ = VOCABULARIES["esm"].encode(b"MK-VLAJ")
    assert np.array_equal(encode(vocabulary, b"MK-VLAJ"), expected)


@pytest.mark.parametrize(("text", "complaint"), [(b"JJJJJA", "5 of 6"), (b"MKV7", "holds '7'"), (b"", "no residues")])
def test_what_would_be_mostly_unknown_is_refused(text: bytes, complaint: str, tokenizers: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    for name in ("EsmTokenizer", "ProtBert"):
        vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(tokenizers[name]), name)
        with pytest.raises(BadSequence, match=complaint):
            encode(vocabulary, text)


def test_a_model_without_x_takes_half_of_its_letters_as_unknown_and_no_more(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *STANDARD_RESIDUES]))
    vocabulary = vocabulary_of(BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False), "without X")
    assert encode(vocabulary, b"XUAA").tolist() == [1, 1, 5, 5]
    with pytest.raises(BadSequence, match="3 of 4"):
        encode(vocabulary, b"XUXA")


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "protein"]))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    with pytest.raises(InputError, match="has no token for ACDEFGHIKLMNPQRSTVWY"):
        vocabulary_of(tokenizer, "words")


def test_a_tokenizer_that_lower_cases_is_refused(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    folder = bert_folder(tmp_path / "bert")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)  # each residue becomes [UNK]
    with pytest.raises(InputError, match="one token each"):
        vocabulary_of(tokenizer, "lower")
