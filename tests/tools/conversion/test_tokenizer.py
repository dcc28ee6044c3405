"""AutoTokenizer on our folders tokenizes as Vocabulary.encode does."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import VOCABULARIES, BadSequence, get_vocabulary
from megaprot.tools.conversion.tokenizer import read_vocabulary, write_tokenizer

NAMES = sorted(VOCABULARIES)
LETTERS = "ACDEFGHIKLMNPQRSTVWYXBUZOJacdefghiklmnpqrstvwyxbuzoj*-. \t\n\r"


@cache
def tokenizer_of(name: str, num_positions: int = 0) -> Any:
    """The tokenizer that transformers loads from the files written for a vocabulary."""
    from transformers import AutoTokenizer

    folder = Path(mkdtemp())
    write_tokenizer(get_vocabulary(name), folder, num_positions)
    (folder / "config.json").write_text('{"model_type": "esm"}')
    return AutoTokenizer.from_pretrained(folder)


def encoded(name: str, text: str) -> list[int]:
    """The ids that packing gives a sequence, boundary tokens included."""
    vocabulary = get_vocabulary(name)
    ids = vocabulary.encode(text.encode())[0].tolist()
    return [vocabulary.begin, *ids] + ([vocabulary.end] if vocabulary.end >= 0 else [])


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(LETTERS, max_size=60))
def test_every_sequence_gets_the_ids_that_training_gives_it(name: str, text: str) -> None:
    try:
        expected = encoded(name, text)
    except BadSequence:  # no residue is left
        expected = encoded(name, "A")
        expected.remove(get_vocabulary(name).tokens.index("A"))
    assert tokenizer_of(name)(text).input_ids == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_in_the_text_is_the_mask_token(name: str) -> None:
    tokenizer, vocabulary = tokenizer_of(name), get_vocabulary(name)
    assert tokenizer.mask_token == vocabulary.tokens[vocabulary.mask]
    expected = encoded(name, "MKWA")
    expected[3] = vocabulary.mask
    assert tokenizer(f"mk{tokenizer.mask_token}A").input_ids == expected


@pytest.mark.parametrize("name", NAMES)
def test_other_characters_become_the_unknown_token_one_for_one(name: str) -> None:
    vocabulary = get_vocabulary(name)
    expected = encoded(name, "MKWA")
    expected[2] = vocabulary.unknown
    assert tokenizer_of(name)("M7WA").input_ids == expected


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_have_their_roles(name: str) -> None:
    tokenizer, vocabulary = tokenizer_of(name), get_vocabulary(name)
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id) == (vocabulary.pad, vocabulary.begin)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (vocabulary.unknown, vocabulary.mask)
    assert tokenizer.eos_token_id == (vocabulary.end if vocabulary.end >= 0 else None)
    assert len(tokenizer) == vocabulary.size
    assert tokenizer.convert_ids_to_tokens(range(vocabulary.size)) == list(vocabulary.tokens)


def test_a_pair_is_joined_as_transformers_own_esm_tokenizer_joins_it(tmp_path: Path) -> None:
    from transformers import EsmTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(get_vocabulary("esm").tokens))
    theirs = EsmTokenizer(str(tmp_path / "vocab.txt"))
    assert tokenizer_of("esm")("MKTA", "WYV").input_ids == theirs("MKTA", "WYV").input_ids
    assert tokenizer_of("esm")("MKTA").input_ids == theirs("MKTA").input_ids


def test_a_pair_without_end_tokens_has_two_beginnings() -> None:
    expected = encoded("proteinlm", "MKTA") + encoded("proteinlm", "WYV")
    assert tokenizer_of("proteinlm")("MKTA", "WYV").input_ids == expected


def test_a_batch_is_padded_and_says_where() -> None:
    batch = tokenizer_of("esm")(["MKTA", "MK"], padding=True)
    assert batch.attention_mask == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch.input_ids[1][4:] == [get_vocabulary("esm").pad] * 2
    assert "token_type_ids" not in batch


def test_decoding_gives_the_letters_back() -> None:
    tokenizer = tokenizer_of("esm")
    assert tokenizer.decode(tokenizer("mkt*aw").input_ids, skip_special_tokens=True) == "MKTXAW"


def test_learned_positions_limit_the_length() -> None:
    assert tokenizer_of("esm", 80).model_max_length == 80
    assert tokenizer_of("esm", 80)("A" * 200, truncation=True).input_ids == encoded("esm", "A" * 78)


@pytest.mark.parametrize("name", NAMES)
def test_the_vocabulary_is_recognised_by_its_tokens(name: str, tmp_path: Path) -> None:
    write_tokenizer(get_vocabulary(name), tmp_path, 0)
    assert read_vocabulary(tmp_path, "") == get_vocabulary(name)
    other = next(one for one in NAMES if one != name)
    with pytest.raises(InputError, match="are not those of"):
        read_vocabulary(tmp_path, other)


def test_a_list_of_tokens_is_enough(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(get_vocabulary("esm").tokens) + "\n")
    assert read_vocabulary(tmp_path, "").name == "esm"


def test_a_vocabulary_that_is_not_said_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--vocabulary"):
        read_vocabulary(tmp_path, "")
    assert read_vocabulary(tmp_path, "iupac").name == "iupac"


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(InputError, match="lists no tokens"):
        read_vocabulary(tmp_path, "")
