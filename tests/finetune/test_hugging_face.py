"""What is no model folder of a known encoder is refused in one sentence; pickled code never runs."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.common.errors import InputError
from megaprot.finetune.hugging_face import fingerprint, load_encoder
from tests.finetune.folders import bert_folder, esm_folder, megatron_bert_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return esm_folder(tmp_path / "esm")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tokenizer(folder: Path) -> None:
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("special*")):
        path.unlink()


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["esm.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no Hugging Face model folder"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "damaged"),
    "another kind": (lambda folder: change_config(folder, model_type="gpt2"), "type gpt2"),
    "a decoder": (lambda folder: change_config(folder, is_decoder=True), "decoder"),
    "relative": (lambda folder: change_config(folder, position_embedding_type="relative_key"), "relative_key"),
    "no tokenizer": (drop_tokenizer, "tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded"),
    "a lost tensor": (lose_a_tensor, "lacks the weights esm.encoder.layer.1.output.dense.weight"),
    "other sizes": (lambda folder: change_config(folder, intermediate_size=96), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(damage: str, folder: Path) -> None:
    act, complaint = DAMAGES[damage]
    act(folder)
    with pytest.raises(InputError, match=complaint) as raised:
        load_encoder(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


class _WritesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_never_runs(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    witness = tmp_path / "it ran"
    torch.save({"weight": _WritesAFile(witness)}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_encoder(folder)
    assert not witness.exists()


def test_code_of_the_folder_never_runs(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "it ran"
    (folder / "modeling.py").write_text(f"open({str(witness)!r}, 'w')\nclass Model: ...\n")
    change_config(folder, auto_map={"AutoModelForMaskedLM": "modeling.Model", "AutoTokenizer": "modeling.Model"})
    load_encoder(folder)
    assert not witness.exists()


def test_pickled_tensors_are_read(folder: Path) -> None:
    from safetensors.torch import load_file

    expected = load_encoder(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_encoder(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_encoder_without_a_head_embeds_and_does_not_score(folder: Path) -> None:
    from transformers import EsmModel

    EsmModel.from_pretrained(folder).save_pretrained(folder)
    assert load_encoder(folder).num_layers == 3
    with pytest.raises(InputError, match=r"lacks the weights lm_head.*; score with a masked-language model"):
        load_encoder(folder, with_head=True)


@pytest.mark.parametrize(
    ("make", "longest"),
    [
        (esm_folder, 0),
        (lambda folder: esm_folder(folder, position_embedding_type="absolute"), 64 - 2 - 2),  # from pad + 1 = 2
        (bert_folder, 64 - 2),
        (megatron_bert_folder, 64 - 1),  # ProteinLM has no end token
    ],
)
def test_the_longest_sequence_is_what_the_positions_hold(
    make: Callable[[Path], Path], longest: int, tmp_path: Path
) -> None:
    from megaprot.finetune.batch import pack
    from tests.finetune.folders import random_proteins, residue_ids

    encoder = load_encoder(make(tmp_path / "model"))
    assert encoder.longest == longest
    for length in (longest, longest + 1) if longest else (500,):
        batch = pack(encoder.vocabulary, residue_ids(encoder, random_proteins([length])))
        if longest and length > longest:
            with pytest.raises((IndexError, RuntimeError)):
                encoder(batch)
        else:
            assert bool(encoder(batch)[0].isfinite().all())


def test_a_fingerprint_changes_with_weights_configuration_and_tokenizer(folder: Path) -> None:
    found = {fingerprint(folder)}
    assert fingerprint(folder) in found
    (folder / "README.md").write_text("a model")
    assert fingerprint(folder) in found
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        with (folder / name).open("ab") as stream:
            stream.write(b" ")
        assert fingerprint(folder) not in found
        found.add(fingerprint(folder))
