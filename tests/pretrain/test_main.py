"""The program's own part of a run: what must stand in the environment before torch is loaded."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from megaprot.common.errors import InputError
from megaprot.pretrain.__main__ import run
from megaprot.pretrain.config import PretrainConfig
assert "torch" not in sys.modules
try:
    run(PretrainConfig(check_processes=-1))
except InputError:
    print(json.dumps([os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules]))
"""


@pytest.mark.parametrize(("given", "expected"), [({}, "100"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_openmp_is_told_to_sleep_before_torch_is_loaded_unless_the_user_says_how(
    given: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == [expected, True]
