"""Our folders in transformers 4.40, run by a Python that has it: ``MEGAPROT_TRANSFORMERS_4_40`` names that Python."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pretrain.model.oracles import esm_for_masked_lm, logits_alone, megatron_bert
from tests.tools.conversion.models import SMALL, converted, largest_difference
from tests.tools.conversion.test_convert import changed, saved

PYTHON = os.environ.get("MEGAPROT_TRANSFORMERS_4_40", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MEGAPROT_TRANSFORMERS_4_40 names no Python with transformers 4.40"),
]
TEXTS = ("mkt*ayiakqr", "-MKTJUOBZ WYV.", "MKT" * 20)


def there(folder: Path) -> dict[str, Any]:
    """What transformers 4.40 makes of a folder."""
    worker = Path(__file__).with_name("with_transformers.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, str(worker), str(folder), *TEXTS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.40.")
    return found


CASES = {
    "rotary": ("esm", lambda: esm_for_masked_lm(changed(token_dropout=True), 80)),
    "learned": ("esm", lambda: esm_for_masked_lm(changed(position_embedding="learned"), 80)),
    "MegatronBert": ("proteinlm", lambda: megatron_bert(SMALL, 80, 31, "gelu_pytorch_tanh")),
}


@pytest.mark.parametrize("case", CASES)
def test_4_40_gives_the_same_ids_and_logits(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary, make = CASES[case]
    theirs: nn.Module = make()
    step = converted(saved(theirs, tmp_path / "source"), tmp_path / "step", "megatron", "--vocabulary", vocabulary)
    folder = converted(step, tmp_path / "hf", "hf")
    found = there(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    assert found["ids"] == ids
    assert found["class"] == type(theirs).__name__
    assert largest_difference([torch.tensor(one) for one in found["logits"]], logits_alone(theirs, ids)) < 1e-4
    assert len(found["filled"]) == 5
    assert not [line for line in found["complaints"] if "not used" in line and "inv_freq" not in line]
