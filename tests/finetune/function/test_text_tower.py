"""The text tower against transformers one text at a time, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from megaprot.common.errors import InputError
from megaprot.finetune.function.text_tower import TextTower, load_text_tower
from tests.finetune.function.towers_data import text_folder

TEXTS = ["binding of protein", "transport", "regulation of lipid transport . ( biological process )"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def tower(folder: Path) -> TextTower:
    return load_text_tower(folder)


def test_a_vector_is_the_mean_over_the_texts_own_tokens(folder: Path, tower: TextTower) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = tower.vectors(tower.encode(TEXTS), max_tokens=30)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():  # alone there is no padding
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(vector, states.mean(dim=0), atol=1e-6, rtol=1e-5)


def test_the_order_of_texts_is_kept_whatever_the_batches(tower: TextTower) -> None:
    texts = tower.encode(TEXTS)
    torch.testing.assert_close(tower.vectors(texts, 8), tower.vectors(texts, 1000), atol=1e-6, rtol=1e-5)
    assert sorted(member for batch in tower.batches(texts, 8) for member in batch) == [0, 1, 2]


def test_texts_longer_than_the_tower_takes_lose_their_end_and_are_named(tower: TextTower) -> None:
    texts = tower.encode(["binding", "binding " * 40, "lipid " * 30])
    assert texts.cut == (1,)  # 40 words and two boundary tokens of 32; 30 and two just fit
    assert [len(ids) for ids in texts.ids] == [3, 32, 32]
    assert texts.ids[1][-1] == texts.ids[0][-1]  # the boundary token is kept
    assert tower.encode([]).ids == ()


def test_a_folder_that_is_no_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_text_tower(tmp_path)
    damaged = text_folder(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_text_tower(damaged)
    decoder = text_folder(tmp_path / "decoder")
    config = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(InputError, match="decoder"):
        load_text_tower(decoder)


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = text_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights encoder\.layer\.1\.output\.dense\.weight"):
        load_text_tower(folder)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harmed",))  # type: ignore[return-value]

    folder = text_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_text_tower(folder)
    assert not (tmp_path / "harmed").exists()
