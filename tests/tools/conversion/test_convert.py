"""`megaprot convert` between Megatron and Hugging Face, in one process, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megaprot.common.manifest import damaged_file, sizes_and_checksums
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain import checkpoint
from megaprot.tools.conversion.hugging_face_writer import write_weights
from megaprot.tools.conversion.megatron_reader import read_megatron
from tests.pretrain.model.hf_weights import from_esm, from_megatron_bert
from tests.pretrain.model.oracles import esm_for_masked_lm, logits_alone, megatron_bert
from tests.pretrain.tiny import ESM, random_sequences
from tests.tools.conversion.models import (
    SMALL,
    assert_same_tensors,
    convert,
    converted,
    fair_esm_of,
    largest_difference,
    loaded,
    refused,
    tensors_of,
)

SEQUENCES = random_sequences((5, 60, 37), seed=4)
WITH_ESM = ("--vocabulary", "esm")


def changed(**values: Any) -> Any:
    """The small model with other values."""
    from dataclasses import replace

    return replace(SMALL, **values)


def saved(model: nn.Module, folder: Path) -> Path:
    """A folder as transformers saves it."""
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """An ESM-2 in the Hugging Face format, the same as a checkpoint, and the model."""
    folder = tmp_path_factory.mktemp("esm")
    theirs = esm_for_masked_lm(changed(token_dropout=True), 80)
    source = saved(theirs, folder / "hf")
    return source, converted(source, folder / "megatron", "megatron", *WITH_ESM), theirs


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "rotary": lambda: esm_for_masked_lm(SMALL, 80),
    "rotary, token dropout": lambda: esm_for_masked_lm(changed(token_dropout=True), 80),
    "learned": lambda: esm_for_masked_lm(changed(position_embedding="learned"), 80),
    "learned, token dropout": lambda: esm_for_masked_lm(changed(position_embedding="learned", token_dropout=True), 80),
    "other epsilon": lambda: esm_for_masked_lm(changed(layer_norm_epsilon=1e-12), 80),
    "MegatronBert, tanh": lambda: megatron_bert(SMALL, 80, 33, "gelu_pytorch_tanh"),
    "MegatronBert, erf": lambda: megatron_bert(SMALL, 80, 33, "gelu"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_from_transformers_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    theirs = VARIANTS[variant]()
    source = saved(theirs, tmp_path / "source")
    step = converted(source, tmp_path / "megatron", "megatron", "--verify", *WITH_ESM)
    back = loaded(converted(step, tmp_path / "back", "hf", "--verify"))
    again = loaded(converted(source, tmp_path / "again", "hf", "--verify", *WITH_ESM))
    assert_same_tensors(again, theirs)
    assert type(back) is type(theirs)
    assert_same_tensors(back, theirs)
    assert largest_difference(logits_alone(back, SEQUENCES), logits_alone(theirs, SEQUENCES)) == 0.0


def test_a_checkpoint_has_the_tensors_of_an_independent_mapping(folders: tuple[Path, Path, nn.Module]) -> None:
    _, step, theirs = folders
    expected = from_esm(theirs.state_dict(), SMALL.num_attention_heads, filler=0.0)
    found = tensors_of(step)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_written_checkpoint_has_the_checksums_of_its_files(folders: tuple[Path, Path, nn.Module]) -> None:
    assert checkpoint.problem_of(folders[1]) == ""
    assert damaged_file(folders[1]) == ""


def test_megatron_bert_has_the_tensors_of_an_independent_mapping(tmp_path: Path) -> None:
    theirs = megatron_bert(SMALL, 80, 33, "gelu_new")
    found = tensors_of(converted(saved(theirs, tmp_path / "hf"), tmp_path / "out", "megatron", *WITH_ESM))
    expected = from_megatron_bert(theirs.state_dict(), SMALL.num_attention_heads, filler=0.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_converted_model_gives_fair_esms_logits(tmp_path: Path) -> None:
    theirs = esm_for_masked_lm(changed(ffn_hidden_size=4 * SMALL.hidden_size, token_dropout=True), 80)
    step = converted(saved(theirs, tmp_path / "hf"), tmp_path / "megatron", "megatron", *WITH_ESM)
    found, fair = loaded(converted(step, tmp_path / "result", "hf")), fair_esm_of(theirs)
    with torch.no_grad():
        expected = [fair(torch.tensor([sequence]))["logits"][0] for sequence in SEQUENCES]
    assert largest_difference(logits_alone(found, SEQUENCES), expected) < 1e-4


def remake_manifest(step: Path) -> None:
    """Let the manifest list the files as they are now."""
    names = [str(path.relative_to(step)) for path in step.rglob("*") if path.is_file() and path.name != "manifest.json"]
    listed = {"format": "megaprot-checkpoint", "version": 1, "files": sizes_and_checksums(step, names)}
    (step / "manifest.json").write_text(json.dumps(listed))


def test_a_rounded_copy_is_the_rounded_model(folders: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    _, step, theirs = folders
    found = dict(loaded(converted(step, tmp_path / "hf", "hf", "--dtype", "bf16", "--verify")).named_parameters())
    assert all(torch.equal(found[name], part.to(torch.bfloat16).float()) for name, part in theirs.named_parameters())
    files = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for name, tensor in files.items() if "inv_freq" not in name} == {torch.bfloat16}
    half = converted(step, tmp_path / "half", "megatron", "--dtype", "fp16")
    assert {tensor.dtype for tensor in tensors_of(half).values()} == {torch.float16}
    assert checkpoint.read_config(half).train.precision == "fp16"


def test_large_models_are_written_in_shards(folders: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    _, step, theirs = folders
    whole = converted(step, tmp_path / "hf", "hf")
    (whole / "model.safetensors").unlink()
    write_weights(read_megatron(step), whole, torch.float32, shard_bytes=100_000)
    shards = sorted(whole.glob("model-*.safetensors"))
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 110_000 for path in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in shards for t in load_file(path).values())
    assert_same_tensors(loaded(whole), theirs)
    again = converted(whole, tmp_path / "again", "megatron")
    assert all(torch.equal(one, tensors_of(step)[name]) for name, one in tensors_of(again).items())


def test_weights_saved_by_torch_are_read_as_well(folders: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    source, step, theirs = folders
    folder = Path(shutil.copytree(source, tmp_path / "bin"))
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    found = tensors_of(converted(folder, tmp_path / "out", "megatron", *WITH_ESM))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(step).items())


def test_fill_mask_and_the_auto_classes_work(folders: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    folder = converted(folders[1], tmp_path / "hf", "hf", "--licence", "cc-by-4.0")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = pipeline("fill-mask", model=loaded(folder), tokenizer=tokenizer, top_k=3)("MKT<mask>YIAKQR")
    with torch.no_grad():
        logits = folders[2](**tokenizer("MKT<mask>YIAKQR", return_tensors="pt")).logits[0, 4]
    expected = [ESM.tokens[index] for index in logits.topk(3).indices]
    assert [answer["token_str"] for answer in answers] == expected
    assert answers[0]["sequence"] == f"MKT{expected[0]}YIAKQR"
    card = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "esm, 33 tokens" in card


def test_rotary_with_tanh_has_no_class(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Path(shutil.copytree(folders[1], tmp_path / "step"))
    (step / "carried.safetensors").unlink()
    text = (step / "config.yaml").read_text()
    (step / "config.yaml").write_text(text.replace("gelu_erf", "gelu_tanh"))
    remake_manifest(step)
    assert "rotary positions with tanh GELU" in refused(step, tmp_path / "hf", "hf", capsys)


def test_a_difference_leaves_no_folder(
    folders: tuple[Path, Path, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megaprot.tools.conversion import hugging_face_writer

    split = hugging_face_writer.split_qkv
    monkeypatch.setattr(hugging_face_writer, "split_qkv", lambda fused, num_heads: split(fused, num_heads)[::-1])
    assert convert(folders[1], tmp_path / "hf", "hf", "--verify") == 1
    assert "source and result differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes").write_text("mine")
    assert "already has content" in refused(folders[1], tmp_path / "hf", "hf", capsys)
    assert (tmp_path / "hf" / "notes").read_text() == "mine"


def test_a_folder_that_is_neither_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "given").mkdir()
    assert "name one of those" in refused(tmp_path / "given", tmp_path / "hf", "hf", capsys)
    assert "does not exist" in refused(tmp_path / "gone", tmp_path / "hf", "hf", capsys)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _change(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new)) and None


STEP_DAMAGES: dict[str, tuple[Callable[[Path], Any], bool, str]] = {
    "cut short": (lambda folder: _cut(folder / "weights" / "__0_0.distcp"), False, "bytes instead of"),
    "shard missing": (lambda folder: (folder / "weights" / "__0_0.distcp").unlink(), False, "is missing"),
    "shard missing unlisted": (lambda folder: (folder / "weights" / "__0_0.distcp").unlink(), True, "No such file"),
    "bit flipped": (lambda folder: _flip(folder / "weights" / "__0_0.distcp"), False, "is damaged"),
    "index missing": (lambda folder: (folder / "weights" / ".metadata").unlink(), True, ".metadata"),
    "other width": (_change("config.yaml", "hidden_size: 64", "hidden_size: 32"), True, "has the shape"),
    "fewer layers": (_change("config.yaml", "num_layers: 4", "num_layers: 3"), True, "no place for"),
    "more layers": (_change("config.yaml", "num_layers: 4", "num_layers: 5"), True, "lacks the tensor"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), False, "manifest.json is missing"),
    "vocabulary": (_change("vocabulary.json", '"esm"', '"other"'), True, "vocabulary.json"),
}


@pytest.mark.parametrize("damage", STEP_DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: str, folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do, is_listed, words = STEP_DAMAGES[damage]
    step = Path(shutil.copytree(folders[1], tmp_path / "step"))
    do(step)
    if is_listed:
        remake_manifest(step)
    assert words in refused(step, tmp_path / "hf", "hf", capsys)
    assert words in refused(step, tmp_path / "megatron", "megatron", capsys)


def test_flags_that_do_not_apply_are_refused(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "leave out" in refused(folders[1], tmp_path / "hf", "hf", capsys, "--vocabulary", "iupac")
    assert "leave out" in refused(folders[1], tmp_path / "hf", "hf", capsys, "--legacy_version", "2.0")


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(
    to: str,
    folders: tuple[Path, Path, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    from megaprot.tools.conversion import safetensors_files

    def full(*anything: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_files, "bytes_of" if to == "hf" else "no such name", full, raising=False)
    monkeypatch.setattr(torch, "save", full)
    assert convert(folders[1], tmp_path / "out", to) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


HF_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda folder: _cut(folder / "model.safetensors"), "bytes instead of"),
    "header cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20), "longer than the file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "config damaged": (lambda folder: (folder / "config.json").write_text("{"), "missing or damaged"),
    "config list": (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
    "other width": (_change("config.json", '"hidden_size": 64', '"hidden_size": 32'), "has the shape"),
    "fewer layers": (_change("config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 3'), "has 3 layers"),
    "more layers": (_change("config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 5'), "lacks the tensor"),
    "vocabulary size": (_change("config.json", '"vocab_size": 33', '"vocab_size": 30'), "30 tokens"),
    "embedding norm": (_change("config.json", 'norm_before": false', 'norm_before": true'), "emb_layer_norm_before"),
    "positions": (_change("config.json", '"rotary"', '"relative_key"'), "relative_key"),
    "class": (_change("config.json", "EsmForMaskedLM", "EsmForTokenClassification"), "EsmForTokenClassification"),
    "type": (_change("config.json", '"esm"', '"t5"'), "EsmForMaskedLM"),
    "heads": (_change("config.json", '"num_attention_heads": 4', '"num_attention_heads": 8'), "contact head"),
    "mask id": (_change("config.json", '"mask_token_id": 32', '"mask_token_id": 31'), "mask_token_id 31"),
    "value missing": (_change("config.json", '"layer_norm_eps"', '"other"'), "layer_norm_eps"),
}


@pytest.mark.parametrize("damage", HF_DAMAGES)
def test_a_damaged_hugging_face_folder_is_refused(
    damage: str, folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do, words = HF_DAMAGES[damage]
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    do(source)
    assert words in refused(source, tmp_path / "out", "megatron", capsys, *WITH_ESM)


def test_a_folder_that_names_no_class_is_verified_as_well(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "architectures"}))
    converted(source, tmp_path / "out", "megatron", "--verify", *WITH_ESM)
    assert "largest difference" in capsys.readouterr().out


def test_an_untied_decoder_is_refused(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tied = tensors["esm.embeddings.word_embeddings.weight"].clone()
    save_file(tensors | {"lm_head.decoder.weight": tied}, source / "model.safetensors")
    converted(source, tmp_path / "tied", "megatron", *WITH_ESM)
    save_file(tensors | {"lm_head.decoder.weight": tied + 1}, source / "model.safetensors")
    assert "is not tied" in refused(source, tmp_path / "out", "megatron", capsys, *WITH_ESM)


def test_a_shard_that_the_index_names_must_be_there(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    (source / "model.safetensors").unlink()
    write_weights(read_megatron(folders[1]), source, torch.float32, shard_bytes=100_000)
    sorted(source.glob("model-*.safetensors"))[1].rename(source / "elsewhere")
    assert "cannot be read" in refused(source, tmp_path / "out", "megatron", capsys, *WITH_ESM)


class _Trap:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_never_runs(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pickle

    trap = tmp_path / "the code ran"
    step = Path(shutil.copytree(folders[1], tmp_path / "step"))
    (step / "weights" / ".metadata").write_bytes(pickle.dumps(_Trap(trap)))
    remake_manifest(step)
    assert "was not loaded" in refused(step, tmp_path / "hf", "hf", capsys)
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    (source / "model.safetensors").unlink()
    torch.save({"lm_head.bias": _Trap(trap)}, source / "pytorch_model.bin")
    assert "was not loaded" in refused(source, tmp_path / "out", "megatron", capsys, *WITH_ESM)
    assert not trap.exists()


def test_post_norm_berts_stay_in_their_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    source = saved(BertForMaskedLM(BertConfig(vocab_size=25, **shape)), tmp_path / "bert")
    assert "normalises after each block" in refused(source, tmp_path / "out", "megatron", capsys)


def test_the_vocabularies_of_other_pads_shift_positions_by_theirs(tmp_path: Path) -> None:
    vocabulary = get_vocabulary("iupac")
    theirs = megatron_bert(SMALL, 80, vocabulary.size, "gelu")
    source = saved(theirs, tmp_path / "hf")
    step = converted(source, tmp_path / "megatron", "megatron", "--vocabulary", "iupac")
    (step / "carried.safetensors").unlink()
    remake_manifest(step)
    found = loaded(converted(step, tmp_path / "esm", "hf", "--verify"))
    assert type(found).__name__ == "EsmForMaskedLM"
    sequences = random_sequences((5, 60), seed=4, vocabulary=vocabulary)
    assert largest_difference(logits_alone(found, sequences), logits_alone(theirs, sequences)) < 1e-4


_PEAKS = """
import sys
from megaprot.tools.conversion.conversion import convert
from megaprot.tools.convert import ConvertConfig

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
convert(ConvertConfig(sys.argv[1], sys.argv[2], "megatron", vocabulary="esm"))
convert(ConvertConfig(sys.argv[2], sys.argv[3], "hf"))
print(peak() - before)
"""


@pytest.mark.slow
def test_no_more_than_a_few_tensors_are_in_memory(tmp_path: Path) -> None:
    import subprocess
    import sys

    shape = {"num_layers": 24, "hidden_size": 640, "ffn_hidden_size": 2560}
    source = saved(esm_for_masked_lm(changed(**shape), 80), tmp_path / "hf")
    weights = (source / "model.safetensors").stat().st_size
    folders = [str(source), str(tmp_path / "megatron"), str(tmp_path / "back")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _PEAKS, *folders], capture_output=True, text=True)
    peak = int(done.stdout.splitlines()[-1]) * 1024
    assert weights > 450e6
    assert peak < 150e6
