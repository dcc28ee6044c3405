"""Mutations: tables, windows that keep them, the score as a difference of two pairs' logits, and runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.config import FinetuneConfig, HeadConfig, LabelConfig
from megaprot.finetune.config_ppi import PpiConfig
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.model_folder import read_model
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.pairs.mutations import MutationExample, changed, other_order, read_mutations, spans_of
from megaprot.finetune.tasks.ppi import Ppi
from megaprot.finetune.tasks.ppi_mutation import PpiMutation
from megaprot.pretrain import parallel
from megaprot.tools import cli
from tests.finetune.folders import esm_folder, random_proteins
from tests.finetune.pairs.pair_data import charged_proteins, pair_folder

ESM = get_vocabulary("esm")


def letters(residues: np.ndarray) -> str:
    return "".join(ESM.tokens[index] for index in residues)


def ids(text: str) -> np.ndarray:
    return ESM.encode(text.encode())[0]


def example(wild: str, mutant: str, partner: str) -> MutationExample:
    return MutationExample(0, 2, "row", ids(wild), ids(mutant), ids(partner), 1)


def test_both_kinds_of_tables_give_the_same_mutations(tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.tsv"
    one.write_text("wild_seq,mutant_seq,participant_sequence,label\nMKVLA,MRVLG,GGSY,1\nMKVLA,MKVLG,GGSY,0\n")
    other.write_text("mutation\tsequence\tparticipant_sequence\tlabel\nK2R:A5G\tMKVLA\tGGSY\t1\nA5G\tmkvla\tGGSY\t0\n")
    found, same = read_mutations(one, ESM), read_mutations(other, ESM)
    assert [letters(part) for part in (found[0].wild, found[0].mutant, found[0].partner)] == ["MKVLA", "MRVLG", "GGSY"]
    for first, second in zip(found, same, strict=True):
        assert (first.label, first.record) == (second.label, second.record)
        assert np.array_equal(first.mutant, second.mutant)
        assert np.array_equal(first.wild, second.wild)
    assert [one.identifier for one in same] == ["K2R:A5G", "A5G"]
    assert found[0].wild is found[1].wild


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sequence,mutation,participant_sequence,label\nMKV,A2R,GG,1", "t.csv:2: A2R needs A at position 2, but seq"),
        ("sequence,mutation,participant_sequence,label\nMKV,V9R,GG,1", "t.csv:2: V9R lies behind the end of sequence"),
        ("sequence,mutation,participant_sequence,label\nMKV,23,GG,1", "t.csv:2: '23' is no substitution such as A23T"),
        ("wild_seq,mutant_seq,participant_sequence,label\nMKV,MKV,GG,1", "t.csv:2: mutant and wild type are the same"),
        ("wild_seq,mutant_seq,participant_sequence,label\nMKV,MKA,,1", "t.csv:2: lacks a sequence"),
        ("wild_seq,mutant_seq,participant_sequence,label\nMKV,MKA,GG,yes", "t.csv:2: the label 'yes' is neither"),
        ("wild_seq,mutant_seq,participant_sequence,label\nMKV,M7A,GG,1", "t.csv:2: the sequence of .* holds '7'"),
        ("wild_seq,participant_sequence\nMKV,GG", "t.csv: has no column 'mutant_seq'; give wild_seq and mutant_seq"),
        ("wild_seq,mutant_seq\nMKV,MKA", "t.csv: has no column 'participant_sequence' in its first"),
        ("wild_seq,mutant_seq,participant_sequence,label\n", "t.csv holds no mutation"),
    ],
)  # fmt: skip
def test_bad_tables_are_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text + "\n")
    with pytest.raises(InputError, match=sentence):
        read_mutations(tmp_path / "t.csv", ESM)


def test_a_table_without_labels_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("wild_seq,mutant_seq,participant_sequence\nMKV,MKA,GG\n")
    assert read_mutations(tmp_path / "test.csv", ESM)[0].label == -1
    with pytest.raises(InputError, match=r"test\.csv:2: has no label"):
        PpiMutation(LabelConfig()).read(tmp_path, "test", ESM)


@pytest.mark.parametrize(
    ("wild", "mutant", "parts"),
    [
        ("MKVLA", "MRVLA", ((1, 2), (1, 2))),
        ("MKVLA", "MRVLG", ((1, 5), (1, 5))),
        ("MKVLA", "MKLA", ((2, 3), (2, 2))),
        ("AAAA", "AAAAA", ((4, 4), (4, 5))),
        ("MKV", "GGSYA", ((0, 3), (0, 5))),
    ],
)
def test_the_changed_part(wild: str, mutant: str, parts: object) -> None:
    assert changed(ids(wild), ids(mutant)) == parts


@given(st.integers(1, 60), st.integers(1, 60), st.integers(4, 50), st.data())
def test_no_window_cuts_a_mutation_off(num_residues: int, num_partner: int, budget: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, num_residues - 1))
    last = min(num_residues - 1, first + data.draw(st.integers(0, 2)))
    wild = np.full(num_residues, 5, dtype=np.uint8)
    mutant = wild.copy()
    mutant[[first, last]] = 6
    made = MutationExample(0, 2, "row", wild, mutant, np.full(num_partner, 7, np.uint8), 1)
    (start, end), of_mutant, (begin, until) = spans_of(made, budget)
    assert start <= first <= last < end
    assert of_mutant == (start, end)  # wild type and mutant are read in the same window
    assert end - start + until - begin == min(budget, num_residues + num_partner)
    assert begin == 0
    if num_residues > end - start:  # in the middle unless the protein ends there
        assert start == 0 or end == num_residues or abs((first + last) / 2 - (start + end - 1) / 2) <= 1.5


def test_mutations_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(InputError, match=r"the mutations of row span 20 residues and a pair may have 18; raise"):
        spans_of(example("A" + "M" * 18 + "A", "G" + "M" * 18 + "G", "GGG"), 18)


def test_scores_are_differences_of_the_pair_models_logits(tmp_path: Path) -> None:
    encoder = load_encoder(esm_folder(tmp_path / "model"))
    task, pairs = PpiMutation(LabelConfig()), Ppi(LabelConfig())
    torch.manual_seed(1)
    head = task.build_head(HeadConfig(hidden_size=16, dropout=0.0), encoder)
    model = task.build_model(encoder, head, True).eval()
    proteins = [protein.decode() for protein in random_proteins((20, 15))]
    mutant = proteins[0][:7] + ("W" if proteins[0][7] != "W" else "Y") + proteins[0][8:]
    made = example(proteins[0], mutant, proteins[1])
    members = [made, other_order(made)]
    with torch.no_grad():
        outputs = model(task.collate(encoder, members, None))
        singles = [PairExample(0, 1, "a", "b", part, made.partner, 1) for part in (made.wild, made.mutant)]
        logits, _, _ = model(pairs.collate(encoder, singles, None))
    found = task.outcomes(outputs, members)
    expected = (logits[1] - logits[0]).numpy()
    assert np.allclose(found[0]["logits"], expected, atol=1e-5)
    assert np.allclose(found[1]["logits"], expected, atol=1e-5)  # scoring averages both orders, whichever is given
    assert np.allclose(found[0]["both"], logits.mean(dim=1).numpy(), atol=1e-5)
    task.pos_weight = 4.5
    difference = float(expected.mean())
    by_hand = 2 * 4.5 * np.log1p(np.exp(-difference))
    assert float(task.loss(outputs, members)) == pytest.approx(by_hand, rel=1e-5)
    with torch.no_grad():  # training reads one order each
        trained = model(task.collate(encoder, members, 3))[0]
    assert np.allclose(trained.numpy(), logits.numpy().T, atol=1e-5)


def table(path: Path, num_rows: int, seed: int) -> Path:
    """Mutations of basic proteins beside acidic ones; those to an acidic residue are labelled 0."""
    generator = np.random.default_rng(seed)
    proteins, lines = charged_proteins(10), ["sequence,mutation,participant_sequence,label"]
    for number in range(num_rows):
        wild = proteins[f"B{generator.integers(10)}"].decode()
        place = int(generator.integers(len(wild)))
        new = ("D", "W")[number % 2]
        partner = proteins[f"A{generator.integers(10)}"].decode()
        lines.append(f"{wild},{wild[place]}{place + 1}{new},{partner},{number % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_zero_shot_from_a_pair_model_and_training_that_begins_with_its_head(tmp_path: Path) -> None:
    if dist.is_initialized():
        parallel.stop_processes()
    model = esm_folder(tmp_path / "model", initializer_range=0.02)
    pairs = pair_folder(tmp_path / "pairs", {"train": 40, "valid": 20})
    (tmp_path / "data").mkdir()
    for seed, split in enumerate(("train", "valid", "test")):
        table(tmp_path / "data" / f"{split}.csv", 24, seed)
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    steps = ["--train.num_steps", "6", "--train.batch_size", "8", "--optim.lr", "0.001", "--head.hidden_size", "16"]
    assert cli.main(["finetune", "--task", "ppi", "--model", str(model), "--data", str(pairs), "--output", str(run),
                     *steps]) == 0  # fmt: skip
    common = ["--task", "ppi_mutation", "--data", str(tmp_path / "data")]
    assert cli.main(["evaluate", *common, "--model", str(run), "--split", "test"]) == 0
    results = json.loads((run / "evaluation_test" / "results.json").read_text())
    assert results["num_examples"] == 24
    assert "one that binds is one with label 1" in (run / "evaluation_test" / "report.html").read_text()
    assert {"aupr", "auroc", "order_flips"} <= set(results["metrics"])
    zero_shot = read_model(run, "ppi_mutation")
    assert (zero_shot.task.threshold, zero_shot.task.temperature) == (0.0, 1.0)  # type: ignore[attr-defined]
    (tmp_path / "new.csv").write_text("sequence,mutation,participant_sequence\nMKVLA,K2R,GGSY\nMKVLA,A5W:K2E,GGSY\n")
    predict = ["predict", "--task", "ppi_mutation", "--model", str(run), "--input", str(tmp_path / "new.csv")]
    assert cli.main([*predict, "--output", str(tmp_path / "new.tsv")]) == 0
    rows = [line.split("\t") for line in (tmp_path / "new.tsv").read_text().splitlines()]
    assert rows[0] == ["identifier", "score", "logit_wild", "logit_mutant"]
    assert [row[0] for row in rows[1:]] == ["K2R", "A5W:K2E"]
    assert all(float(row[1]) == pytest.approx(float(row[3]) - float(row[2]), abs=1e-4) for row in rows[1:])
    command = ["finetune", *common, "--model", str(run / "best" / "encoder"), "--output", str(tuned)]
    assert cli.main([*command, *steps, "--optim.lr", "1e-12"]) == 0
    before, after = read_model(run), read_model(tuned, "ppi_mutation")
    for name, weight in before.model.head.state_dict().items():  # type: ignore[union-attr,operator]
        assert torch.allclose(after.model.head.state_dict()[name], weight, atol=1e-6)  # type: ignore[union-attr,operator]
    assert cli.main([*command, "--output", str(tmp_path / "other"), "--head.hidden_size", "8"]) == 2
    assert cli.main([*command, "--output", str(tmp_path / "other"), "--head.name", "plm-interact"]) == 2
    assert cli.main(["evaluate", "--task", "ppi", "--model", str(tuned), "--data", str(pairs), "--split", "valid"]) == 2


def test_windows_over_both_proteins_are_not_for_mutations() -> None:
    config = FinetuneConfig("ppi_mutation", "model", "data", "output", ppi=PpiConfig(long_pairs="windows"))
    with pytest.raises(InputError, match="mutations are read in the window around them"):
        PpiMutation(LabelConfig()).configure(config)
