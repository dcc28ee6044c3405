"""TAPE's transformer and PLM-interact's weights become folders that transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from megaprot.finetune.model_folder import read_model
from megaprot.pretrain import parallel
from megaprot.pretrain.config import ModelConfig
from megaprot.tools import cli
from tests.pretrain.model.oracles import esm_for_masked_lm, logits_alone, randomise
from tests.pretrain.tiny import random_sequences
from tests.tools.conversion.models import assert_same_tensors, converted, largest_difference, loaded, refused

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MORE = {"max_position_embeddings": 90, "type_vocab_size": 1, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
HEAD = {"cls.predictions.transform": "mlm.transform", "cls.predictions.bias": "mlm.bias"}


def bert(vocabulary_size: int = 30) -> nn.Module:
    """A BERT of transformers, which computes what TAPE's transformer does."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(vocab_size=vocabulary_size, **SHAPE, **MORE)).eval()
    randomise(model, 3)
    return model


def tape_names(model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that TAPE's modules have, its tied decoder and its pooler with them."""
    named = {"bert.pooler.dense.weight": torch.zeros((32, 32)), "bert.pooler.dense.bias": torch.zeros(32)}
    for name, tensor in model.state_dict().items():
        if "decoder" in name:
            continue
        for theirs, tapes in HEAD.items():
            name = name.replace(theirs, tapes)
        named[name] = tensor
    return named | {"mlm.decoder.weight": model.state_dict()["bert.embeddings.word_embeddings.weight"]}


def tape_folder(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder as TAPE's ``save_pretrained`` leaves it."""
    folder.mkdir()
    values = SHAPE | MORE | {"vocab_size": 30, "num_labels": 2, "torchscript": False, "finetuning_task": None}
    (folder / "config.json").write_text(json.dumps(values | changes))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_tapes_transformer_is_a_bert(tmp_path: Path) -> None:
    theirs = bert()
    source = tape_folder(tmp_path / "tape", tape_names(theirs), vocab_size=8000)  # as its files say, which is outdated
    found = loaded(converted(source, tmp_path / "hf", "hf"))
    assert type(found).__name__ == "BertForMaskedLM"
    assert_same_tensors(found, theirs)


def test_tapes_own_model_gives_the_same_logits(tmp_path: Path) -> None:
    tape = pytest.importorskip("tape")
    theirs = tape.ProteinBertForMaskedLM(tape.ProteinBertConfig(vocab_size=30, **SHAPE, **MORE)).eval()
    theirs.save_pretrained(str(tmp_path))
    found = loaded(converted(tmp_path, tmp_path / "hf", "hf"))
    sequences = [[2, 5, 6, 7, 1, 29, 3], [2, *range(5, 30), 3]]
    with torch.no_grad():
        expected = [theirs(torch.tensor([one]), torch.ones((1, len(one))))[0][0] for one in sequences]
    assert largest_difference(logits_alone(found, sequences), expected) < 1e-5


def test_without_its_head_it_is_an_encoder(tmp_path: Path) -> None:
    from transformers import AutoModel

    tensors = {name: tensor for name, tensor in tape_names(bert()).items() if not name.startswith("mlm.")}
    folder = converted(tape_folder(tmp_path / "tape", tensors), tmp_path / "hf", "hf")
    found = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name.removeprefix("bert.")], tensor) for name, tensor in tensors.items())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]


def test_what_is_wrong_with_tapes_files_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tape_folder(tmp_path / "tape", tape_names(bert()))
    assert "--to hf" in refused(source, tmp_path / "out", "megatron", capsys)
    wide = tape_folder(tmp_path / "wide", tape_names(bert()), hidden_size=64)
    assert "has the shape" in refused(wide, tmp_path / "out", "hf", capsys)
    (source / "pytorch_model.bin").write_bytes(b"not a file of torch")
    assert "was not loaded" in refused(source, tmp_path / "out", "hf", capsys)


ESM_SHAPE = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, token_dropout=True)


def plm_interact(model: nn.Module) -> dict[str, Tensor]:
    """The state of PLM-interact's wrapper around an ESM-2."""
    generator = torch.Generator().manual_seed(1)
    head = {"classifier.weight": torch.randn((1, 64), generator=generator), "classifier.bias": torch.ones(1)}
    return {f"esm_mask.{name}": tensor for name, tensor in model.state_dict().items()} | head


@pytest.mark.parametrize("form", ["folder", "folder with a configuration", "epoch", "wrapped epoch"])
def test_plm_interacts_weights_give_encoder_and_pair_head(form: str, tmp_path: Path) -> None:
    theirs = esm_for_masked_lm(ESM_SHAPE, 1024)
    state = plm_interact(theirs)
    (tmp_path / "given").mkdir()
    given = tmp_path / "given"
    if form.startswith("folder"):
        torch.save(state, given / "pytorch_model.bin")
        if form != "folder":
            (given / "config.json").write_text(json.dumps({"model_type": "esm", "num_hidden_layers": 33}))
    else:
        prefix = "module." if form == "wrapped epoch" else ""
        held = {prefix + name: tensor for name, tensor in state.items()}
        given = given / "epoch_3.pt"
        torch.save({"model": held, "epoch": 3, "optimizer": {"state": {}}, "loss": torch.ones(1)}, given)
    folder = converted(given, tmp_path / "hf", "hf", "--verify")
    assert_same_tensors(loaded(folder), theirs)
    assert load_file(folder / "head.safetensors")["classifier.weight"].equal(state["classifier.weight"])
    sequences = random_sequences((9, 40), seed=2)
    assert largest_difference(logits_alone(loaded(folder), sequences), logits_alone(theirs, sequences)) == 0.0


def test_plm_interacts_weights_score_pairs(tmp_path: Path) -> None:
    """Its formula on one sequence at a time with transformers' own model; the command reads the folder as it is."""
    theirs = esm_for_masked_lm(ESM_SHAPE, 1024)
    state = plm_interact(theirs)
    (tmp_path / "given").mkdir()
    torch.save(state, tmp_path / "given" / "pytorch_model.bin")
    folder = converted(tmp_path / "given", tmp_path / "hf", "hf")
    (tmp_path / "data").mkdir()
    pairs = [("MKVLAGG", "WYDE", 1), ("ACDEFGHIK", "LMNPQ", 0), ("GGS", "MKT", 1)]
    lines = [f"{first},{second},{label}" for first, second, label in pairs]
    (tmp_path / "data" / "test.csv").write_text("\n".join(["query,text,label", *lines]) + "\n")
    tuned = read_model(folder, "ppi")
    vocabulary = tuned.encoder.vocabulary
    examples = tuned.task.read(tmp_path / "data", "test", vocabulary)
    with torch.no_grad():
        outputs = tuned.model(tuned.task.collate(tuned.encoder, examples, None))
        for (first, second, _), logits in zip(pairs, outputs[0], strict=True):
            for one, other, logit in ((first, second, logits[0]), (second, first, logits[1])):
                ids = [[vocabulary.tokens.index(letter) for letter in protein] for protein in (one, other)]
                tokens = torch.tensor([[vocabulary.begin, *ids[0], vocabulary.end, *ids[1], vocabulary.end]])
                states = theirs.esm(tokens).last_hidden_state[0, 0]
                expected = state["classifier.weight"][0] @ states.relu() + state["classifier.bias"][0]
                assert float(logit) == pytest.approx(float(expected), abs=1e-5)
    if dist.is_initialized():
        parallel.stop_processes()
    command = ["evaluate", "--task", "ppi", "--model", str(folder), "--data", str(tmp_path / "data"), "--split", "test"]
    assert cli.main(command) == 0
    assert json.loads((folder / "evaluation_test" / "results.json").read_text())["num_examples"] == 3


def test_a_file_that_is_not_plm_interacts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "given").mkdir()
    torch.save({"weight": torch.ones(3)}, tmp_path / "given" / "epoch_1.pt")
    assert "no esm_mask.* tensors" in refused(tmp_path / "given" / "epoch_1.pt", tmp_path / "out", "hf", capsys)
    torch.save({"esm_mask.weight": torch.ones(3)}, tmp_path / "given" / "epoch_1.pt")
    assert "lacks esm_mask." in refused(tmp_path / "given" / "epoch_1.pt", tmp_path / "out", "hf", capsys)
