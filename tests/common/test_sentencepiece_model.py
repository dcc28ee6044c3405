"""SentencePiece vocabularies against the library itself, the letter policy, and models that are none of residues."""

import base64
import gzip
import io
import json
import pickle
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common import sentencepiece_model
from megaprot.common.errors import InputError
from megaprot.common.sentencepiece_model import RESIDUE_LETTERS, SPECIAL_PIECES, SampledSequences
from megaprot.common.vocabulary import Vocabulary, get_vocabulary
from tests.common.columns import columns

CUT = Path(__file__).parents[2] / "examples" / "pfam" / "Pfam-A.cut.fasta.gz"
DOMAINS = [
    text.partition("\n")[2].replace("\n", "") for text in gzip.decompress(CUT.read_bytes()).decode().split(">")[1:]
][::25]


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model.train(DOMAINS, 400)


@pytest.fixture(scope="module")
def vocabulary(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("model") / "pfam.model"
    path.write_bytes(model)
    return get_vocabulary(str(path))


@pytest.fixture(scope="module")
def processor(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def trained(texts: list[str], **settings: Any) -> bytes:
    """A model trained with the library's own defaults but for ``settings``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, hard_vocab_limit=False, **settings
    )
    return model.getvalue()


OURS = {
    "model_type": "bpe", "vocab_size": 60, "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "control_symbols": ["<mask>"],
    "bos_piece": "<cls>", "pad_piece": "<pad>", "eos_piece": "<eos>",
}  # fmt: skip


def test_its_tokens_are_the_special_ones_and_pieces_of_residues(vocabulary: Vocabulary) -> None:
    assert vocabulary.name == "sentencepiece"
    assert vocabulary.size == 400
    assert vocabulary.tokens[:5] == SPECIAL_PIECES
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    special = (vocabulary.begin, vocabulary.pad, vocabulary.end, vocabulary.unknown, vocabulary.mask)
    assert special == vocabulary.special_ids
    assert vocabulary.num_boundary_tokens == 2
    assert set(RESIDUE_LETTERS) <= set(vocabulary.tokens)
    assert all(re.fullmatch(f"[{RESIDUE_LETTERS}]+", token) for token in vocabulary.tokens[5:])
    assert max(map(len, vocabulary.tokens[5:])) > 1


def test_replacements_are_pieces_of_the_20_residues(vocabulary: Vocabulary) -> None:
    pieces = {vocabulary.tokens[index] for index in vocabulary.replacements}
    assert pieces == {token for token in vocabulary.tokens if not set(token) - set("ACDEFGHIKLMNPQRSTVWY")}
    assert not set(vocabulary.replacements) & set(vocabulary.special_ids)


@given(st.text(RESIDUE_LETTERS, min_size=1, max_size=80))
def test_sequences_are_cut_as_the_library_cuts_them_and_spell_the_same(
    vocabulary: Vocabulary, processor: Any, text: str
) -> None:
    ids, changes = vocabulary.encode(text.encode())
    assert ids.tolist() == processor.encode(text)
    assert "".join(vocabulary.tokens[index] for index in ids) == text
    assert ids.dtype == np.uint16
    assert not changes


def test_the_letter_policy_comes_before_the_pieces(vocabulary: Vocabulary) -> None:
    ids, changes = vocabulary.encode(b"-acD*J.j EF**")
    assert "".join(vocabulary.tokens[index] for index in ids) == "ACDXXXXEF"
    assert changes == get_vocabulary("iupac").encode(b"-acD*J.j EF**")[1]
    assert changes["replaced_J"] == 2


def test_a_block_is_encoded_as_its_records_are(vocabulary: Vocabulary) -> None:
    texts = [*DOMAINS[:40], "acD*J", "", "AC7", "W", "-"]
    block = vocabulary.encode_block(*columns(texts))
    kept = [number for number, text in enumerate(texts) if text not in ("", "AC7", "-")]
    assert block.kept.tolist() == kept
    for number, (start, end) in zip(kept, pairwise(block.bounds.tolist()), strict=True):
        assert block.ids[start:end].tolist() == vocabulary.encode(texts[number].encode())[0].tolist()
    assert block.bad == [(41, "has no residues"), (42, "holds '7' at position 3"), (44, "has no residues")]
    assert (block.ids.dtype, block.bounds.dtype) == (np.uint16, np.int64)
    assert len(vocabulary.encode_block(*columns([])).kept) == 0


def test_up_to_256_pieces_an_id_is_one_byte(tmp_path: Path) -> None:
    (tmp_path / "small.model").write_bytes(sentencepiece_model.train(DOMAINS, 256))
    small = get_vocabulary(str(tmp_path / "small.model"))
    assert small.size == 256
    assert small.dtype is np.uint8
    assert small.encode(DOMAINS[0].encode())[0].dtype == np.uint8
    assert small.encode_block(*columns(DOMAINS[:2])).ids.dtype == np.uint8


def test_the_model_travels_within_the_vocabulary(vocabulary: Vocabulary, model: bytes) -> None:
    recorded = json.loads(json.dumps(vocabulary.to_dict()))
    assert base64.b64decode(recorded["model"]) == model
    rebuilt = Vocabulary.from_dict(recorded)
    assert rebuilt == vocabulary
    assert rebuilt.encode(DOMAINS[0].encode())[0].tolist() == vocabulary.encode(DOMAINS[0].encode())[0].tolist()
    copied = pickle.loads(pickle.dumps(vocabulary))  # noqa: S301 - our own bytes
    assert copied == vocabulary
    assert copied.encode(b"ACD")[0].tolist() == vocabulary.encode(b"ACD")[0].tolist()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "no base 64!"}, "cannot be read"),
        ({"model": ""}, "is no vocabulary of residues"),
        ({"tokens": ["A"]}, "does not have the tokens and ids"),
        ({"mask": 5}, "does not have the tokens and ids"),
    ],
)
def test_an_altered_record_is_refused(vocabulary: Vocabulary, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Vocabulary.from_dict(vocabulary.to_dict() | changed)


def test_training_again_gives_the_same_bytes(model: bytes) -> None:
    assert sentencepiece_model.train(iter(DOMAINS), 400) == model
    assert sentencepiece_model.train(DOMAINS[1:], 400) != model


def test_long_sequences_are_trained_on_too() -> None:
    model = sentencepiece_model.train(["ACA" * 20_000], 40)
    assert len(sentencepiece.SentencePieceProcessor(model_proto=model).encode("ACA" * 40)) <= 40


def test_more_pieces_than_there_are_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"5000 pieces cannot be trained from these sequences \(.+\): lower size or add sequences"
    ):
        sentencepiece_model.train(["ACDACD"], 5000)


@pytest.mark.parametrize(
    ("texts", "settings", "said"),
    [
        (["the quick brown fox"] * 9, {"vocab_size": 30}, "it lacks one of <cls>"),
        ([*RESIDUE_LETTERS[:-1], "ACD"], OURS, f"it lacks one of the letters {RESIDUE_LETTERS}"),
        ([*RESIDUE_LETTERS, "ACD jump"], OURS, "hold other characters than residues"),
        ([*RESIDUE_LETTERS, "ACDACD"], OURS | {"add_dummy_prefix": True}, "hold other characters than residues"),
        (
            [*RESIDUE_LETTERS, "ACDACD"],
            OURS | {"control_symbols": [], "user_defined_symbols": ["<mask>"]},
            "are not control symbols",
        ),
    ],
)
def test_a_model_of_something_else_is_refused(
    texts: list[str], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(trained(texts, **settings))
    with pytest.raises(InputError) as caught:
        get_vocabulary(str(path))
    assert str(caught.value).startswith(f"{path}: the SentencePiece model is no vocabulary of residues (")
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 100])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "no.model").write_bytes(content)
    with pytest.raises(InputError, match=r"no\.model: the SentencePiece model is no vocabulary of residues"):
        get_vocabulary(str(tmp_path / "no.model"))


def test_a_truncated_model_is_refused(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(InputError, match=r"cut\.model: the SentencePiece model is no vocabulary of residues"):
        get_vocabulary(str(tmp_path / "cut.model"))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.model: cannot be read \(No such file or directory\)"):
        get_vocabulary(str(tmp_path / "gone.model"))


def test_commands_that_need_a_token_a_residue_say_so(vocabulary: Vocabulary) -> None:
    assert not vocabulary.is_per_residue
    with pytest.raises(InputError) as caught:
        vocabulary.require_per_residue("Scoring of mutations")
    assert str(caught.value) == (
        "Scoring of mutations needs one token a residue, which the vocabulary sentencepiece does not have: "
        "preprocess with --vocabulary esm or iupac or proteinlm."
    )


def test_a_sample_is_all_or_uniform() -> None:
    few = SampledSequences(10, seed=0)
    for number in range(10):
        few.add(str(number))
    assert few.sequences == [str(number) for number in range(10)]
    counts = Counter[str]()
    for seed in range(2000):
        sample = SampledSequences(3, seed)
        for number in range(12):
            sample.add(str(number))
        assert len(set(sample.sequences)) == 3
        counts.update(sample.sequences)
    assert sample.num_seen == 12
    assert all(abs(counts[str(number)] - 500) < 100 for number in range(12))  # five standard deviations
