"""The three vocabularies against the tables of their sources, and the letter policy against a loop over letters."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmTokenizer

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import BadSequence, Vocabulary, get_vocabulary
from tests.common.columns import columns

NAMES = ("esm", "iupac", "proteinlm")
# Written out by hand from the sources: fair-esm's `Alphabet` of ESM-1b and ESM-2, TAPE's `IUPAC_VOCAB`, and ProteinLM's
# `iupac_vocab.txt`, whose `[unused1]` puts every residue one higher than in TAPE's.
ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
IUPAC_IDS = {
    "<pad>": 0, "<mask>": 1, "<cls>": 2, "<sep>": 3, "<unk>": 4, "A": 5, "B": 6, "C": 7, "D": 8, "E": 9, "F": 10,
    "G": 11, "H": 12, "I": 13, "K": 14, "L": 15, "M": 16, "N": 17, "O": 18, "P": 19, "Q": 20, "R": 21, "S": 22,
    "T": 23, "U": 24, "V": 25, "W": 26, "X": 27, "Y": 28, "Z": 29,
}  # fmt: skip
PROTEINLM_IDS = {
    "[PAD]": 0, "[MASK]": 1, "[CLS]": 2, "[SEP]": 3, "[UNK]": 4, "[unused1]": 5, "A": 6, "B": 7, "C": 8, "D": 9,
    "E": 10, "F": 11, "G": 12, "H": 13, "I": 14, "K": 15, "L": 16, "M": 17, "N": 18, "O": 19, "P": 20, "Q": 21,
    "R": 22, "S": 23, "T": 24, "U": 25, "V": 26, "W": 27, "X": 28, "Y": 29, "Z": 30,
}  # fmt: skip


def test_esm_has_the_ids_of_transformers_esm_tokenizer(tmp_path: Path) -> None:
    vocabulary = get_vocabulary("esm")
    (tmp_path / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQXBUZOWCD"
    ids, changes = vocabulary.encode(sequence.encode())
    assert [vocabulary.begin, *ids, vocabulary.end] == tokenizer(sequence)["input_ids"]
    assert not changes
    assert (vocabulary.pad, vocabulary.mask) == (tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert (vocabulary.begin, vocabulary.end) == (tokenizer.cls_token_id, tokenizer.eos_token_id)
    assert vocabulary.unknown == tokenizer.unk_token_id
    assert vocabulary.size == 33


def test_esm_has_the_tokens_of_fair_esm_where_it_is_installed() -> None:
    data = pytest.importorskip("esm").data
    assert list(get_vocabulary("esm").tokens) == data.Alphabet.from_architecture("ESM-1b").all_toks


@pytest.mark.parametrize(("name", "ids"), [("iupac", IUPAC_IDS), ("proteinlm", PROTEINLM_IDS)])
def test_iupac_and_proteinlm_have_the_ids_of_their_sources(name: str, ids: dict[str, int]) -> None:
    vocabulary = get_vocabulary(name)
    assert {token: index for index, token in enumerate(vocabulary.tokens)} == ids
    assert [vocabulary.pad, vocabulary.mask, vocabulary.begin, vocabulary.unknown] == [0, 1, 2, 4]


def test_proteinlm_sequences_get_no_end_token() -> None:
    assert [get_vocabulary(name).num_boundary_tokens for name in NAMES] == [2, 2, 1]
    assert [get_vocabulary(name).end for name in NAMES] == [2, 3, -1]


@pytest.mark.parametrize("name", NAMES)
def test_residues_and_special_tokens_are_told_apart(name: str) -> None:
    vocabulary = get_vocabulary(name)
    assert "".join(vocabulary.tokens[index] for index in vocabulary.replacements) == "ACDEFGHIKLMNPQRSTVWY"
    assert {vocabulary.tokens[index][0] for index in vocabulary.special_ids} <= {"<", "["}
    assert {vocabulary.pad, vocabulary.mask, vocabulary.begin, vocabulary.unknown} <= set(vocabulary.special_ids)


def naive_encode(vocabulary: Vocabulary, text: str) -> tuple[list[int], Counter[str]]:
    """The letter policy, one letter at a time."""
    changes: Counter[str] = Counter()
    letters = []
    for letter in text:
        if letter.isspace():
            changes["whitespace_removed"] += 1
            continue
        changes["upper_cased"] += letter.islower()
        letters.append(letter.upper())
    for end in (0, -1):
        while letters and letters[end] in "*-.":
            changes[f"dropped_{letters.pop(end)}"] += 1
    ids = []
    for letter in letters:
        if letter in "*-." or letter not in vocabulary.tokens:
            changes[f"replaced_{letter}"] += 1
            letter = "X"
        ids.append(vocabulary.tokens.index(letter))
    return ids, +changes


@given(st.sampled_from(NAMES), st.text("ACDEFGHIKLMNPQRSTVWYXBUZOJacjx*-. \n\t", max_size=60))
def test_encoding_follows_the_letter_policy(name: str, text: str) -> None:
    vocabulary = get_vocabulary(name)
    expected_ids, expected_changes = naive_encode(vocabulary, text)
    if not expected_ids:
        with pytest.raises(BadSequence, match="has no residues"):
            vocabulary.encode(text.encode())
        return
    ids, changes = vocabulary.encode(text.encode())
    assert (ids.tolist(), changes) == (expected_ids, expected_changes)
    assert ids.dtype == "uint8"


@given(
    st.sampled_from(NAMES),
    st.lists(st.one_of(st.text("ACDEFGHIK", max_size=30), st.text("ACDJacj*-. 7\xe9\n", max_size=12)), max_size=12),
    st.text("ACD7", max_size=5),
)
def test_a_block_is_encoded_as_its_records_are(name: str, texts: list[str], before: str) -> None:
    vocabulary = get_vocabulary(name)
    records = [text.encode("latin-1") for text in texts]
    expected_ids, expected_bad, expected_changes = [], [], Counter[str]()
    for number, record in enumerate(records):
        try:
            ids, changes = vocabulary.encode(record)
            expected_ids.append((number, ids.tolist()))
            expected_changes += changes
        except BadSequence as error:
            expected_bad.append((number, str(error)))
    letters = np.frombuffer(before.encode() + b"".join(records), dtype=np.uint8)
    bounds = len(before) + np.cumsum([0, *map(len, records)])
    block = vocabulary.encode_block(letters, bounds)
    ids_of = [block.ids[start:end].tolist() for start, end in zip(block.bounds, block.bounds[1:], strict=False)]
    assert list(zip(block.kept.tolist(), ids_of, strict=True)) == expected_ids
    assert (block.bad, block.changes) == (expected_bad, expected_changes)
    assert (block.bounds[0], block.bounds[-1]) == (0, len(block.ids))
    assert (block.ids.dtype, block.bounds.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("name", NAMES)
def test_the_letter_table_turns_ids_into_letters_again(name: str) -> None:
    vocabulary = get_vocabulary(name)
    block = vocabulary.encode_block(*columns(["ACDEFGHIKLMNPQRSTVWYXBUZO", "MKJ*V"]))
    assert block.ids.tobytes().translate(vocabulary.letter_table) == b"ACDEFGHIKLMNPQRSTVWYXBUZO" + b"MKXXV"
    assert bytes(vocabulary.special_ids).translate(vocabulary.letter_table) == b"X" * len(vocabulary.special_ids)


@pytest.mark.parametrize("name", NAMES)
def test_letters_have_one_token_and_one_byte_each(name: str) -> None:
    vocabulary = get_vocabulary(name)
    assert vocabulary.is_per_residue
    assert vocabulary.dtype is np.uint8
    vocabulary.require_per_residue("Anything")


def test_what_was_changed_is_counted_by_kind() -> None:
    ids, changes = get_vocabulary("iupac").encode(b"--acD*J.j EF**")
    assert [get_vocabulary("iupac").tokens[index] for index in ids] == list("ACDXXXXEF")
    assert changes == {
        "upper_cased": 3, "whitespace_removed": 1, "dropped_-": 2, "dropped_*": 2,
        "replaced_*": 1, "replaced_.": 1, "replaced_J": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("residues", "said"),
    [
        (b"ACD7E", "holds '7' at position 4"),
        (b"AC/D", "holds '/' at position 3"),
        (b"AC\xc3\xa9", "holds the byte 0xc3 at position 3"),
        (b"\x01ACD", "holds the byte 0x01 at position 1"),
        (b"AC>D", "holds '>' at position 3"),
        (b"", "has no residues"),
        (b" -*", "has no residues"),
    ],
)
def test_what_is_no_letter_makes_the_sequence_bad(residues: bytes, said: str) -> None:
    with pytest.raises(BadSequence) as caught:
        get_vocabulary("esm").encode(residues)
    assert str(caught.value) == said


@given(st.binary(max_size=40))
def test_any_bytes_are_encoded_to_residues_or_refused(residues: bytes) -> None:
    vocabulary = get_vocabulary("proteinlm")
    try:
        ids, _ = vocabulary.encode(residues)
    except BadSequence:
        return
    assert not set(ids.tolist()) & set(vocabulary.special_ids)
    assert max(ids) < vocabulary.size


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_survives_json_and_pickle(name: str) -> None:
    vocabulary = get_vocabulary(name)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary  # noqa: S301 - our own bytes


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown vocabulary 'esm3': choose one of esm, iupac, proteinlm"):
        get_vocabulary("esm3")


def test_recorded_tokens_that_differ_from_the_vocabulary_of_that_name_are_refused() -> None:
    recorded = get_vocabulary("esm").to_dict()
    recorded["tokens"][4:6] = ["A", "L"]
    with pytest.raises(InputError, match="recorded vocabulary 'esm'"):
        Vocabulary.from_dict(recorded)
