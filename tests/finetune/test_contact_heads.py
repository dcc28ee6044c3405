"""Contact heads: ESM's regression of all maps at once, TAPE's own head, a naive bilinear form, and windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megaprot.finetune.config import HeadConfig, LabelConfig
from megaprot.finetune.contact_heads import ATTENTION_SCALE, split_maps, weighed_maps
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.protein_states import Proteins, gather_proteins, whole_states
from megaprot.finetune.tasks import open_task
from tests.finetune.folders import alone, bert_folder, esm_folder, random_proteins, residue_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return esm_folder(tmp_path_factory.mktemp("esm") / "model", token_dropout=False)


def maps_of(model: nn.Module, proteins: Proteins) -> list[torch.Tensor]:
    """A model's maps, [L, L] a protein."""
    return split_maps(model(proteins), proteins.num_residues)


def contact_model(encoder: Encoder, head: str, is_frozen: bool = False) -> nn.Module:
    task = open_task("contact_prediction", LabelConfig())
    config = HeadConfig(name=head, hidden_size=8, dropout=0.0)
    torch.manual_seed(3)
    model = task.build_model(encoder, task.build_head(config, encoder), is_frozen)
    for name, parameter in model.head.named_parameters():
        nn.init.normal_(parameter, std=1 / ATTENTION_SCALE if "weights" in name else 1.0)
    return model.eval()


def test_attention_head_is_esms_own_contact_head(folder: Path) -> None:
    from esm.modules import ContactPredictionHead

    encoder = load_encoder(folder)
    model = contact_model(encoder, "attention")
    theirs = ContactPredictionHead(12, prepend_bos=True, append_eos=True, eos_idx=2)
    weights = model.head.weights.weight.reshape(1, -1)
    theirs.regression.weight.data = ATTENTION_SCALE * weights.detach()
    theirs.regression.bias.data = model.head.bias.detach().clone()
    proteins = random_proteins((23, 9, 23, 31))
    with torch.no_grad():
        found = maps_of(model, gather_proteins(encoder.vocabulary, 0, residue_ids(encoder, proteins)))
    for logits, protein in zip(found, proteins, strict=True):
        attentions = torch.stack(alone(folder, protein.decode(), output_attentions=True).attentions, dim=1)
        tokens = torch.tensor([[0, *([5] * len(protein)), 2]])
        expected = theirs(tokens, attentions)[0]
        assert logits.shape == (len(protein), len(protein))
        assert torch.allclose(logits.sigmoid(), expected, atol=1e-5)


def test_tapes_head_equals_tapes_and_its_loss_too(folder: Path) -> None:
    modeling = pytest.importorskip("tape.models.modeling_utils")
    encoder = load_encoder(folder)
    model = contact_model(encoder, "tape")
    theirs = modeling.PairwiseContactPredictionHead(32, ignore_index=-1).eval()
    theirs.predict[1].load_state_dict(model.head.linear.state_dict())
    proteins = gather_proteins(encoder.vocabulary, 0, residue_ids(encoder, random_proteins((70, 70))))
    labels = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (2, 70, 70)))
    with torch.no_grad():
        states = whole_states(encoder, proteins).view(2, 72, 32)
        (loss, _), expected = theirs(states, torch.tensor([70, 70]), labels)
        logits = maps_of(model, proteins)
    assert torch.allclose(torch.stack(logits), expected[..., 1] - expected[..., 0], atol=1e-4)
    chosen = torch.stack(logits)[labels >= 0]
    ours = nn.functional.binary_cross_entropy_with_logits(chosen, labels[labels >= 0].float())
    assert float(ours) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("head", ["combined", "attention", "low_rank", "tape"])
def test_maps_are_symmetric_and_those_of_each_protein_alone(head: str, folder: Path) -> None:
    encoder = load_encoder(folder)
    model = contact_model(encoder, head)
    ids = residue_ids(encoder, random_proteins((12, 7, 12, 20)))
    with torch.no_grad():
        together = maps_of(model, gather_proteins(encoder.vocabulary, 0, ids))
        for found, one in zip(together, ids, strict=True):
            (expected,) = maps_of(model, gather_proteins(encoder.vocabulary, 0, [one]))
            assert torch.allclose(found, expected, atol=1e-4)
            assert torch.allclose(found, found.t(), atol=1e-4)


def test_low_rank_head_is_a_naive_bilinear_form(folder: Path) -> None:
    encoder = load_encoder(folder)
    model = contact_model(encoder, "low_rank")
    proteins = gather_proteins(encoder.vocabulary, 0, residue_ids(encoder, random_proteins((9,))))
    with torch.no_grad():
        (found,) = maps_of(model, proteins)
        states = model.head.project(whole_states(encoder, proteins)[1:-1])
        left, right = states[:, :8], states[:, 8:]
        for i in range(9):
            for j in range(9):
                product = (left[i] @ right[j] + left[j] @ right[i]) / 2 / 8**0.5
                expected = product + model.head.separation.weight[abs(i - j), 0]
                assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-4)


def test_average_product_correction_by_hand() -> None:
    weight = torch.tensor([3.0, 0.0])
    maps = torch.stack((torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.ones(2, 2))).unsqueeze(0)
    symmetric = torch.tensor([[2.0, 6.0], [6.0, 6.0]])
    rows = symmetric.sum(dim=1)
    assert torch.allclose(weighed_maps(maps, weight)[0], 3.0 * (symmetric - torch.outer(rows, rows) / 20.0))


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("head", ["combined", "attention", "low_rank", "tape"])
def test_gradients_reach_the_head_and_the_encoder_unless_it_is_frozen(head: str, is_frozen: bool, folder: Path) -> None:
    encoder = load_encoder(folder)
    model = contact_model(encoder, head, is_frozen).train()
    logits = maps_of(model, gather_proteins(encoder.vocabulary, 0, residue_ids(encoder, random_proteins((9, 13)))))
    sum(one.square().sum() for one in logits).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.head.parameters())
    query = encoder.model.encoder.layer[0].attention.self.query.weight
    assert (query.grad is not None and bool(query.grad.any())) != is_frozen


def test_long_proteins_are_read_in_windows_and_averaged(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "model")
    encoder = load_encoder(folder)  # 62 residues at most
    short, long = residue_ids(encoder, random_proteins((20, 100)))
    proteins = gather_proteins(encoder.vocabulary, encoder.longest, [short, long])
    assert proteins.cuts == ((0, 0), (1, 0), (1, 38))
    with torch.no_grad():
        found = whole_states(encoder, proteins)
        parts = [whole_states(encoder, gather_proteins(encoder.vocabulary, 0, [one]))
                 for one in (short, long[:62], long[38:])]  # fmt: skip
    first, second = parts[1], parts[2]
    expected = [first[:39], (first[39:63] + second[1:25]) / 2, second[25:]]
    assert torch.allclose(found, torch.cat([parts[0], *expected]), atol=1e-5)
    model = contact_model(encoder, "attention")
    with torch.no_grad():
        _, logits = maps_of(model, proteins)
        (window,) = maps_of(model, gather_proteins(encoder.vocabulary, 0, [long[:62]]))
    assert logits.shape == (100, 100)
    assert torch.allclose(logits[:38, :38], window[:38, :38], atol=1e-5)
    assert torch.allclose(logits[0, 99], model.head.bias)  # no window saw both ends: no evidence
