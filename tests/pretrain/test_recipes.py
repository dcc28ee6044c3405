"""The shipped recipes: their shapes are ESM-2's and ProteinLM's, and every layout they name passes validation."""

import re
from pathlib import Path

import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM

from megaprot.common.command_line import parse_config
from megaprot.common.masking import MaskingConfig
from megaprot.common.packing_plan import check_row_shape
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.__main__ import RECIPES
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.report import count_parameters
from megaprot.pretrain.validation import check_batch, check_layout, check_model, check_numbers

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read(name: str, *flags: str) -> PretrainConfig:
    return parse_config(PretrainConfig, ["--config", name, *flags], program="test", description="", recipes=RECIPES)


def layouts(name: str) -> list[tuple[int, list[str]]]:
    """Return (GPUs, flags) of each layout the recipe's comment names."""
    text = (Path(RECIPES) / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.findall(r"^#   (\d+) GPUs?: (.*)$", text, flags=re.MULTILINE)
    return [(int(gpus), [] if flags == "(no flags)" else flags.split()) for gpus, flags in found]


def test_the_size_ladder_is_there() -> None:
    sizes = ("8m", "35m", "150m", "650m", "3b", "15b")
    assert {*(f"esm2_{size}" for size in sizes), "proteinlm_200m", "quickstart"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_a_recipe_names_is_valid_for_it(name: str) -> None:
    named = layouts(name)
    assert named
    for num_processes, flags in named:
        config = read(name, *flags)
        check_numbers(config)
        check_model(config.model, config.parallel)
        check_batch(config.train, config.parallel, check_layout(config, num_processes))
        MaskingConfig(config.data.mask_probability)
        check_row_shape(config.data.row_tokens, config.data.max_sequence_length, 2)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("esm2_")])
def test_parameters_are_those_of_transformers_esm2_of_that_shape(name: str) -> None:
    config = read(name)
    shape = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=config.model.hidden_size,
        num_hidden_layers=config.model.num_layers,
        num_attention_heads=config.model.num_attention_heads,
        intermediate_size=config.model.feed_forward_size,
        position_embedding_type="rotary",
    )
    with torch.device("meta"):
        oracle = EsmForMaskedLM(shape)
    contact_head = sum(p.numel() for n, p in oracle.named_parameters() if "contact_head" in n)
    expected = sum(parameter.numel() for parameter in oracle.parameters()) - contact_head
    assert count_parameters(config, get_vocabulary("esm").size) == expected


def test_proteinlm_has_the_published_shape() -> None:
    config = read("proteinlm_200m")
    vocabulary = get_vocabulary("proteinlm")
    # 204 M as published counts the pooler-less encoder with its learned positions; the head adds h^2 and little else.
    head = config.model.hidden_size**2 + 3 * config.model.hidden_size + vocabulary.size
    assert (count_parameters(config, vocabulary.size) - head) / 1e6 == pytest.approx(204, rel=0.005)
    assert config.data.max_sequence_length == 2176


def test_a_batch_of_the_esm2_recipes_is_about_two_million_tokens() -> None:
    for name in NAMES:
        if name.startswith("esm2_"):
            config = read(name)
            assert config.train.global_batch_rows * config.data.row_tokens == 2**21
