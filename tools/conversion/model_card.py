"""The model card of an exported folder: what the model is, what it was trained on, how well it predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaprot.pretrain import checkpoint
from megaprot.pretrain.config import PretrainConfig
from megaprot.tools.conversion.names import Architecture
from megaprot.tools.conversion.source_model import SourceModel

_UNRECORDED = "Not recorded."
_LETTERS = "One token a residue."
_PIECES = "Pieces of several residues by byte-pair encoding; `vocabulary.model` is the SentencePiece model."
_TOKENIZER = (
    "Lower case is read as upper case; white space is removed; `*`, `-` and `.` are dropped at the ends and read as X "
    "inside; letters the vocabulary lacks are read as X."
)


def _json_of(path: Path) -> dict[str, Any]:
    """Return what a JSON file beside the checkpoint says; nothing where it is gone, since it only informs."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _validation(run: Path, step: int) -> dict[str, str]:
    """Return the last validation numbers of a run up to ``step``."""
    path, last = run / "metrics.jsonl", dict[str, Any]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line) if line.endswith("}") else {}
        if "validation_loss" in row and row.get("step", 0) <= step:
            last = row
    names = {"validation_perplexity": "validation perplexity", "validation_masked_accuracy": "validation accuracy"}
    return {text: f"{last[key]:.4g} (step {last['step']})" for key, text in names.items() if key in last}


def _of_sources(manifest: Mapping[str, Any]) -> str:
    counted = f"{manifest.get('num_sequences', 0):,} sequences, {manifest.get('num_residues', 0):,} residues"
    sources = manifest.get("sources", [])
    names = [str(source.get("path", source)) if isinstance(source, dict) else str(source) for source in sources]
    return f"{counted}, from " + ", ".join(Path(name).name for name in names) + "." if names else f"{counted}."


def _of_exclusions(manifest: Mapping[str, Any]) -> str:
    """Return what a corpus leaves out: families or clans held out, sequences excluded, and how the split was made."""
    split, exclusion = manifest.get("split") or {}, manifest.get("exclusion") or {}
    said = []
    if split.get("hold_out"):
        said.append(f"Held out by {split.get('by')}: {', '.join(map(str, split['hold_out']))}.")
    if exclusion.get("files"):
        names = ", ".join(Path(file["path"]).name for file in exclusion["files"])
        said.append(
            f"Left out: {exclusion.get('num_removed', 0):,} sequences like those of {names} (identity "
            f"{exclusion.get('identity')} or more, by {exclusion.get('method')})."
        )
    if not said:
        said.append("No sequences were excluded.")
    shares = ", ".join(f"{name} {split[name]}" for name in ("valid", "test") if split.get(name))
    if shares:
        said.append(f"Split by {split.get('by')}: {shares}.")
    return " ".join(said)


def facts_of_run(step: Path, config: PretrainConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a checkpoint's own files say of its training: texts by heading, and a table of numbers.

    The corpora and the run's log are read where they still are; what is gone is said to be not recorded.
    """
    state = _json_of(step / checkpoint.STATE)
    folders = [config.data.path] if config.data.path else config.data.blend[1::2]
    manifests = [_json_of(Path(folder) / "train.json") for folder in folders]
    data = [_of_sources(manifest) for manifest in manifests if manifest]
    exclusions = [_of_exclusions(manifest) for manifest in manifests if manifest]
    facts = {"Training data": "\n\n".join(data) or _UNRECORDED, "Exclusions": "\n\n".join(exclusions) or _UNRECORDED}
    sizes = {"steps": f"{state.get('step', 0):,}", "residues seen": f"{state.get('consumed_residues', 0):,}"}
    return facts, sizes | _validation(step.parent.parent, state.get("step", 0))


def write_card(folder: Path, source: SourceModel, architecture: Architecture, licence: str, notes: list[str]) -> None:
    """Write ``README.md``, a model card as the Hugging Face hub shows them.

    Args:
        folder: The exported folder.
        source: The model.
        architecture: transformers' class it became.
        licence: Identifier of the licence of the weights.
        notes: Sentences about what differs from the source.
    """
    model, vocabulary = source.model, source.vocabulary
    limit = "trained on up to" if model.position_embedding == "rotary" else "up to"
    rows = {
        "class": architecture.name,
        "layers, width, heads, feed-forward": f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}, "
        f"{model.feed_forward_size}",
        "positions": f"{model.position_embedding}, {limit} {source.num_positions} tokens",
        "activation": model.activation,
        "token dropout": "yes" if model.token_dropout else "no",
        "vocabulary": f"{vocabulary.name}, {vocabulary.size} tokens",
        **source.sizes,
    }
    lines = ["---", "library_name: transformers", f"license: {licence}", "pipeline_tag: fill-mask"]
    lines += ["tags:", "- protein", "- masked-language-model", "---", "", "# Protein language model", ""]
    lines += ["A masked-language model of protein sequences, in this format by Megaprot.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    for heading, text in source.facts.items():
        lines += [f"## {heading}", "", text, ""]
    cut = _LETTERS if vocabulary.is_per_residue else _PIECES
    lines += ["## Tokenizer", "", f"{cut} {_TOKENIZER}", "", "## Use", "", "```python", *_usage(source), "```", ""]
    if notes:
        lines += ["## Notes", "", *(f"* {note}" for note in notes), ""]
    lines += ["## Licence", "", f"Weights: {licence}. Training data: under the licences of their sources.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _usage(source: SourceModel) -> list[str]:
    mask = source.vocabulary.tokens[source.vocabulary.mask]
    return ["from transformers import pipeline", f'pipeline("fill-mask", model="FOLDER")("MKT{mask}YIAKQR")']
