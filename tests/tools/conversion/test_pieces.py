"""SentencePiece vocabularies in exported folders cut sequences as training does, and come back."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megaprot.common import sentencepiece_model
from megaprot.common.errors import InputError
from megaprot.common.sentencepiece_model import MODEL_FILE, RESIDUE_LETTERS
from megaprot.common.vocabulary import BadSequence, Vocabulary, get_vocabulary
from megaprot.pretrain import checkpoint
from megaprot.tools.conversion.tokenizer import read_vocabulary, write_tokenizer
from tests.pretrain.model.oracles import esm_for_masked_lm, logits_alone, randomise
from tests.tools.conversion.models import SMALL, assert_same_tensors, converted, largest_difference, loaded, refused

# Repeats: where many neighbours make the same piece, their order decides.
REPEATED = st.lists(st.sampled_from(["A", "L", "AA", "AL", "LAL", "GAG", "K"]), min_size=1, max_size=60).map("".join)
ANYTHING = st.text(RESIDUE_LETTERS + RESIDUE_LETTERS.lower() + "J*-. \n", max_size=80)


def esm_of(vocabulary: Vocabulary) -> nn.Module:
    """A random EsmForMaskedLM of the small shape for a vocabulary."""
    from transformers import EsmForMaskedLM

    config = esm_for_masked_lm(replace(SMALL, token_dropout=True), 80).config
    config.vocab_size, config.mask_token_id, config.pad_token_id = vocabulary.size, vocabulary.mask, vocabulary.pad
    model: nn.Module = EsmForMaskedLM(config).eval()
    randomise(model, 2)
    return model


def texts() -> list[str]:
    """Sequences with repeats and without."""
    draw = random.Random(7)
    repeats = ["".join(draw.choices(("A", "AL", "GAG", "L"), k=draw.randint(5, 40))) for _ in range(300)]
    return repeats + ["".join(draw.choices(RESIDUE_LETTERS, k=60)) for _ in range(300)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """The vocabulary of a model trained on them."""
    path = tmp_path_factory.mktemp("model") / "trained.model"
    path.write_bytes(sentencepiece_model.train(texts(), 200))
    return get_vocabulary(str(path))


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer that transformers loads from the files written for it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(vocabulary, folder, 0)
    (folder / "config.json").write_text('{"model_type": "esm"}')
    return AutoTokenizer.from_pretrained(folder)


def encoded(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids that packing gives a sequence, boundary tokens included; those alone where no residue is left."""
    try:
        ids = vocabulary.encode(text.encode())[0].tolist()
    except BadSequence:
        ids = []
    return [vocabulary.begin, *ids, vocabulary.end]


@given(text=REPEATED | ANYTHING)
def test_every_sequence_gets_the_pieces_that_training_gives_it(
    text: str, vocabulary: Vocabulary, tokenizer: Any
) -> None:
    assert tokenizer(text).input_ids == encoded(vocabulary, text)


def test_long_sequences_and_whole_batches_too(vocabulary: Vocabulary, tokenizer: Any) -> None:
    sequences = ["".join(texts()), "A" * 5000, "AL" * 3001, *texts()]
    assert tokenizer(sequences).input_ids == [encoded(vocabulary, sequence) for sequence in sequences]
    assert max(map(len, vocabulary.tokens)) > 6


def test_decoding_gives_the_letters_back_and_masks_stay(vocabulary: Vocabulary, tokenizer: Any) -> None:
    ids = tokenizer("mkgagag*alal").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "MKGAGAGXALAL"
    masked = tokenizer("MK<mask>AL").input_ids
    assert masked.count(vocabulary.mask) == 1
    assert masked[0] == vocabulary.begin and masked[-1] == vocabulary.end


def test_a_model_of_pieces_goes_to_and_fro(vocabulary: Vocabulary, tmp_path: Path) -> None:
    theirs = esm_of(vocabulary)
    theirs.save_pretrained(tmp_path / "source")
    (tmp_path / "other name.model").write_bytes(sentencepiece_model.train(texts(), 200))
    named = ("--vocabulary", str(tmp_path / "other name.model"))
    step = converted(tmp_path / "source", tmp_path / "megatron", "megatron", "--verify", *named)
    assert checkpoint.read_vocabulary(step) == vocabulary
    folder = converted(step, tmp_path / "hf", "hf", "--verify")
    assert_same_tensors(loaded(folder), theirs)
    assert "byte-pair encoding" in (folder / "README.md").read_text()
    again = converted(folder, tmp_path / "again", "megatron")
    assert checkpoint.read_vocabulary(again) == vocabulary
    sequences = [encoded(vocabulary, text) for text in texts()[::100]]
    assert largest_difference(logits_alone(loaded(folder), sequences), logits_alone(theirs, sequences)) == 0.0


def test_the_tokens_beside_a_model_must_be_its_own(vocabulary: Vocabulary, tmp_path: Path) -> None:
    write_tokenizer(vocabulary, tmp_path, 0)
    assert read_vocabulary(tmp_path, "") == vocabulary
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(InputError, match="SentencePiece model with --vocabulary"):
        read_vocabulary(tmp_path, "")
    (tmp_path / MODEL_FILE).write_bytes(sentencepiece_model.train(texts(), 150))
    with pytest.raises(InputError, match="are not those of"):
        read_vocabulary(tmp_path, "")


def test_unigram_models_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    shared = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*RESIDUE_LETTERS.replace("", " ").split(), *texts()]),
        model_prefix=str(tmp_path / "unigram"), model_type="unigram", vocab_size=80, hard_vocab_limit=False,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, control_symbols=["<mask>"],
        bos_piece="<cls>", pad_piece="<pad>", eos_piece="<eos>", **shared,
    )  # fmt: skip
    unigram = get_vocabulary(str(tmp_path / "unigram.model"))
    esm_of(unigram).save_pretrained(tmp_path / "source")
    named = ("--vocabulary", str(tmp_path / "unigram.model"))
    step = converted(tmp_path / "source", tmp_path / "megatron", "megatron", *named)
    assert "no byte-pair encoding" in refused(step, tmp_path / "hf", "hf", capsys)
