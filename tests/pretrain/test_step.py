"""One step: what it adds up, and that the host asks the device for nothing before the end."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaprot.common.errors import InputError
from megaprot.pretrain.blend import Blend
from megaprot.pretrain.corpus import Corpus
from megaprot.pretrain.engine import check_fp8, finalize_gradients
from megaprot.pretrain.model.attention import rotary_table, rotate
from megaprot.pretrain.model.feed_forward import bias_gelu
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.training import Training
from tests.pretrain.tiny import tiny_config, write_domains


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(write_domains(tmp_path_factory.mktemp("domains")) / "train")


def training_of(domains: Corpus, place: Place, folder: Path, **sections: dict[str, Any]) -> Training:
    sections = {"model": {"num_layers": 2}, "run": {"dir": str(folder / "run")}} | sections
    return Training(tiny_config(**sections), Blend((domains,), (domains,)), place)


class HostReads(TorchDispatchMode):
    """Counts ``item()``, ``float(tensor)``, ``bool(tensor)`` and the like, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [{}, {"distributed_optimizer": True}], ids=["whole", "sharded"])
def test_the_host_reads_no_number_while_a_step_is_handed_to_the_device(
    domains: Corpus, alone: Place, tmp_path: Path, precision: str, parallel: dict[str, Any]
) -> None:
    training = training_of(domains, alone, tmp_path, train={"precision": precision}, parallel=parallel)
    steps = training.steps()
    step, rows, _ = next(steps)
    training.take_step(step, rows, [1.0])
    step, rows, _ = next(steps)
    with HostReads() as reads:
        training.take_step(step, rows, [1.0])
    assert reads.count == 0  # the list of sums at its end is no such call
    with HostReads() as reads:
        training.optimizer.get_grad_norm()  # megatron-core's own
    assert reads.count > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_it_once(domains: Corpus, alone: Place, tmp_path: Path) -> None:
    training = training_of(domains, alone, tmp_path, train={"precision": "bf16"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, rows, _ in training.steps():
            caught.clear()
            torch.cuda.set_sync_debug_mode("warn")
            training.take_step(step, rows, [1.0])
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


def test_the_gradient_norm_is_that_of_all_gradients(domains: Corpus, alone: Place, tmp_path: Path) -> None:
    training = training_of(domains, alone, tmp_path, optim={"clip_grad": 0.0})
    step, rows, _ = next(training.steps())
    result, skipped = training.take_step(step, rows, [])
    assert not skipped
    squares = [float(parameter.main_grad.double().square().sum()) for parameter in training.chunks[0].parameters()]
    assert result.grad_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    assert result.grad_norm == pytest.approx(training.optimizer.get_grad_norm(), rel=1e-6)


def test_gradients_are_divided_by_the_masked_positions_and_left_alone_where_there_are_none(
    domains: Corpus, alone: Place, tmp_path: Path
) -> None:
    training = training_of(domains, alone, tmp_path)
    gradients = [parameter.main_grad for parameter in training.chunks[0].parameters()]
    for masked, expected in ((8, 0.25), (0, 2.0)):
        for gradient in gradients:
            gradient.fill_(2.0)
        finalize_gradients(training.chunks, torch.tensor(masked, dtype=torch.int))
        assert all(bool((gradient == expected).all()) for gradient in gradients)


def test_the_functions_that_gpus_compile_are_traced_whole_and_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn((24, 2, 8), generator=generator).bfloat16() for _ in range(2))
    tables = [rotary_table(places, 8) for places in (torch.arange(24), torch.arange(24) % 7)]
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True, dynamic=False)
    assert all(
        torch.equal(*pair) for pair in zip(compiled(query, key, *tables), rotate(query, key, *tables), strict=True)
    )
    states, bias = torch.randn((24, 1, 32), generator=generator), torch.randn(32, generator=generator)
    for is_tanh in (False, True):
        found = []
        for function in (bias_gelu, torch.compile(bias_gelu, backend="aot_eager", fullgraph=True, dynamic=False)):
            inputs = states.clone().requires_grad_(), bias.clone().requires_grad_()
            output = function(*inputs, is_tanh)
            found.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said on a machine without a GPU")
def test_fp8_is_refused_where_it_cannot_run() -> None:
    check_fp8(tiny_config())
    with pytest.raises(InputError, match=r"train\.fp8 needs a GPU"):
        check_fp8(tiny_config(train={"precision": "bf16", "fp8": True}))
    with pytest.raises(InputError, match=r"train\.precision bf16"):
        check_fp8(tiny_config(train={"fp8": True}))
