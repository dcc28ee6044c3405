"""The text tower: any Hugging Face text encoder, its states averaged over a text's tokens.

Local files only, no code and no pickles from them. What sentence encoders (MiniLM) were trained for is the masked mean;
BERTs of biomedical text (BioBERT, PubMedBERT) do well with it too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaprot.common.errors import InputError
from megaprot.common.quiet import quiet
from megaprot.finetune.batching import plan_batches

TEXT_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a batch of texts, padding included."""


@dataclass(frozen=True)
class Texts:
    """Texts as token ids, boundary tokens included.

    Attributes:
        ids: Of each text, as long as the tower takes.
        cut: Places of the texts that were longer and lost their end.
    """

    ids: tuple[tuple[int, ...], ...]
    cut: tuple[int, ...]


@dataclass(frozen=True)
class TextBatch:
    """Texts padded to the longest of them.

    Attributes:
        tokens: Ids int64 [num_texts, length].
        is_token: What is no padding, int64 [num_texts, length].
    """

    tokens: Tensor
    is_token: Tensor

    def to(self, device: torch.device) -> TextBatch:
        """Return the batch on a device."""
        return TextBatch(self.tokens.to(device, non_blocking=True), self.is_token.to(device, non_blocking=True))


class TextTower(nn.Module):
    """A text encoder: batches of texts in, one vector a text out.

    Attributes:
        model: transformers' model.
        tokenizer: transformers' tokenizer.
        longest: Most tokens of a text, boundary tokens included.
    """

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.longest = longest

    @property
    def hidden_size(self) -> int:
        """Size of the vectors."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.model.device
        return device

    def encode(self, texts: Sequence[str]) -> Texts:
        """Return texts as tokens; those that are too long lose their end and are named."""
        if not texts:
            return Texts((), ())
        whole = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        cut = tuple(place for place, ids in enumerate(whole) if len(ids) > self.longest)
        for place in cut:  # by the tokenizer, which keeps the boundary token at the end
            whole[place] = self.tokenizer(texts[place], truncation=True, max_length=self.longest)["input_ids"]
        return Texts(tuple(map(tuple, whole)), cut)

    def batches(self, texts: Texts, max_tokens: int = 0) -> list[list[int]]:
        """Return which texts share a batch: numbers of texts of about one length, the longest first.

        Args:
            texts: The texts.
            max_tokens: Most tokens of a batch, padding included; 0 takes the device's default.
        """
        budget = max_tokens or TEXT_TOKENS[self.device.type]
        return plan_batches([len(ids) for ids in texts.ids], budget, is_padding_free=False)

    def pad(self, ids: Sequence[tuple[int, ...]]) -> TextBatch:
        """Return texts as one batch on the CPU."""
        rows = [torch.tensor(one) for one in ids]
        tokens = nn.utils.rnn.pad_sequence(rows, True, int(self.tokenizer.pad_token_id))
        lengths = torch.tensor([len(one) for one in ids])
        return TextBatch(tokens, (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).long())

    def forward(self, batch: TextBatch) -> Tensor:
        """Return fp32 [num_texts, hidden_size]: the mean of the last hidden states over each text's tokens."""
        found = self.model(input_ids=batch.tokens, attention_mask=batch.is_token)
        is_token = batch.is_token.unsqueeze(2)
        sums = (found.last_hidden_state.float() * is_token).sum(dim=1)
        vectors: Tensor = sums / is_token.sum(dim=1)
        return vectors

    @torch.no_grad()
    def vectors(self, texts: Texts, max_tokens: int = 0) -> Tensor:
        """Return the vectors [num_texts, hidden_size] of any number of texts, on the tower's device, no gradients."""
        found = torch.zeros(len(texts.ids), self.hidden_size, device=self.device)
        for members in self.batches(texts, max_tokens):
            batch = self.pad([texts.ids[member] for member in members]).to(self.device)
            found[torch.tensor(members, device=self.device)] = self(batch)
        return found


def check_text_folder(folder: Path) -> None:
    """Raise InputError for what is no folder of a Hugging Face model."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no Hugging Face model folder (it has no config.json); name a text encoder's, "
                         "such as PubMedBERT's or MiniLM's.")  # fmt: skip


def load_text_tower(folder: Path, *, device: torch.device | None = None, precision: str = "fp32") -> TextTower:
    """Return the text encoder of a folder that ``save_pretrained`` wrote, in evaluation mode.

    Args:
        folder: ``config.json``, weights (safetensors, or ``.bin`` of tensors alone) and tokenizer files.
        device: Where to; the CPU if left out.
        precision: ``fp32`` or ``bf16``, the type of the weights.

    Raises:
        InputError: The folder is none such, is damaged, lacks weights or holds a decoder.
    """
    check_text_folder(folder)
    quiet("transformers")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # see load_encoder
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **offline)
        model, report = transformers.AutoModel.from_pretrained(
            str(folder), output_loading_info=True, torch_dtype=torch.float32, **offline
        )
    except Exception as error:
        text = " ".join(str(error).split())[:160].rstrip(" .:;")
        raise InputError(f"the text encoder {folder} cannot be loaded ({text}); restore its files.") from error
    _check(folder, model, tokenizer, report)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    model = model.to(device or torch.device("cpu")).eval()
    num_positions = int(model.config.max_position_embeddings)
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):  # they count from pad + 1
        num_positions -= int(model.config.pad_token_id) + 1
    return TextTower(model, tokenizer, num_positions)


def _check(folder: Path, model: Any, tokenizer: Any, report: dict[str, Any]) -> None:
    """Raise InputError for a model that gives no vectors of texts."""
    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{folder} holds a decoder; name a text encoder.")
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name and "position_ids" not in name)
    if missing:
        raise InputError(f"{folder} lacks the weights {missing[0]}; restore it.")
    if not hasattr(config, "max_position_embeddings") or tokenizer.pad_token_id is None:
        raise InputError(f"{folder} holds a model of the type {config.model_type}; name an encoder like BERT.")
