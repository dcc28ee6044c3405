"""Worker: what each rank's share of a model computes, saved by rank for the test to put together.

``python -m tests.distributed.sharded_model RESULTS TASKS``: TASKS is a file of ``torch.save`` with a list of tasks;
task N leaves ``TASKS.N``, a list by rank, and a line in RESULTS.
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain import parallel
from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.model.attention import PackedAttention, pack_sequences
from tests.distributed.layouts import Layouts, to_config
from tests.distributed.run import run_processes
from tests.pretrain.global_weights import load_global
from tests.pretrain.tiny import ESM, batch_of

ROW_TOKENS = 128


def outputs(config: PretrainConfig, place: parallel.Place, task: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's logits [row_tokens, share of the vocabulary] and last hidden states [share of the row, hidden]."""
    vocabulary = get_vocabulary(task["vocabulary"])
    model = build_model(config, transformer_config(config), vocabulary, place)[0].module
    load_global(model, task["weights"])
    hidden: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, arguments, output: hidden.append(output[:, 0]))
    with torch.no_grad():
        logits = model.eval()(batch_of(task["sequences"], ROW_TOKENS, vocabulary.pad, place.device))
    return {"logits": logits, "hidden": hidden[0]}


def dropout_masks(config: PretrainConfig, place: parallel.Place, task: dict[str, Any]) -> dict[str, Tensor]:
    """Which elements the embedding and each residual branch kept, for two rows of each of two steps, twice over.

    Weights are such that every place of the embedding and every branch is 1 before dropout: the difference of one
    layer's output from the last is the mask.

    Returns:
        By step: bool [2 rows, 1 + num_layers, this rank's share of the row, hidden_size].
    """
    model = build_model(config, transformer_config(config), ESM, place)[0].module.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_one = name.endswith(("word_embeddings.weight", "linear_proj.bias"))
            parameter.fill_(1.0 if is_one else 0.0)
    streams: list[Tensor] = []
    for module in (model.embedding, *model.encoder.layers):
        module.register_forward_hook(
            lambda module, arguments, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
    batch = batch_of([[ESM.unknown] * ROW_TOKENS], ROW_TOKENS, ESM.pad, place.device)
    found = {}
    for name, step in (("step 1", 1), ("step 2", 2), ("step 1 again", 1)):
        parallel.seed_dropout(config.run.seed, step, place)
        rows = []
        for _ in range(2):
            streams.clear()
            with torch.no_grad():
                model(batch)
            before = [torch.zeros_like(streams[0]), *streams[:-1]]
            rows.append(torch.stack([new - old > 0.5 for new, old in zip(streams, before, strict=True)])[:, :, 0])
        found[name] = torch.stack(rows)
    return found


def hidden_states_under_dropout(
    config: PretrainConfig, place: parallel.Place, task: dict[str, Any]
) -> dict[str, Tensor]:
    """Output of the embedding and of every layer [1 + num_layers, share of the row, hidden_size], dropout on."""
    model = build_model(config, transformer_config(config), ESM, place)[0].module.train()
    streams: list[Tensor] = []
    for module in (model.embedding, *model.encoder.layers):
        module.register_forward_hook(
            lambda module, arguments, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
    parallel.seed_dropout(config.run.seed, 1, place)
    with torch.no_grad():
        model(batch_of(task["sequences"], ROW_TOKENS, ESM.pad, place.device))
    return {"hidden": torch.stack(streams)[:, :, 0]}


def attention_of_equal_heads(config: PretrainConfig, place: parallel.Place, task: dict[str, Any]) -> dict[str, Tensor]:
    """What attention makes of the same queries, keys and values on every rank, with dropout and without."""
    attention = PackedAttention("sdpa", transformer_config(config), 1)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn((ROW_TOKENS, 2, 16), generator=generator).to(place.device)
    packed = pack_sequences(torch.tensor([0, 100, 128], dtype=torch.int32, device=place.device), (100, 28))
    parallel.seed_dropout(config.run.seed, 1, place)
    attended = attention.train()(states, states, states, None, packed_seq_params=packed)
    following = torch.rand(8, device=place.device)  # of the state that tensor-parallel ranks share
    plain = attention.eval()(states, states, states, None, packed_seq_params=packed)
    return {"dropout": attended, "plain": plain, "following": following}


TASKS = {
    "outputs": outputs,
    "masks": dropout_masks,
    "hidden": hidden_states_under_dropout,
    "attention": attention_of_equal_heads,
}


def run_tasks(
    tasks: dict[str, tuple[str, PretrainConfig, dict[str, Any]]], num_processes: int, folder: Path
) -> dict[str, list[dict[str, Tensor]]]:
    """Run (kind, configuration, more) tasks on ``num_processes`` ranks; returns what each rank found, by task."""
    listed = folder / "tasks.pt"
    torch.save([{"kind": kind, "config": asdict(config)} | more for kind, config, more in tasks.values()], listed)
    run_processes("tests.distributed.sharded_model", num_processes, [str(listed)])
    return {name: torch.load(f"{listed}.{number}", weights_only=True) for number, name in enumerate(tasks)}


def main() -> None:
    """Do every task of the list."""
    results, listed = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    layouts = Layouts(parallel.start_processes(5.0))
    for number, task in enumerate(torch.load(listed, weights_only=True)):
        config = to_config(task["config"])
        place = layouts.lay_out(config.parallel)
        mine = {name: tensor.cpu() for name, tensor in TASKS[task["kind"]](config, place, task).items()}
        everyone: list[Any] = [None] * place.world_size
        dist.all_gather_object(everyone, mine)
        if place.is_main:
            torch.save(everyone, f"{listed}.{number}")
            with results.open("a") as stream:
                stream.write(json.dumps({"task": number}) + "\n")
    parallel.stop_processes()


if __name__ == "__main__":
    main()
