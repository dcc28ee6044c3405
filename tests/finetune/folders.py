"""Small Hugging Face folders with random weights, and what transformers makes of a sequence by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaprot.common.vocabulary import STANDARD_RESIDUES, get_vocabulary
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.residues import encode
from megaprot.tools.conversion.tokenizer import write_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide, so that what is wrong shows
}


def _save(model: Any, folder: Path) -> Path:
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def esm_folder(folder: Path, **config: Any) -> Path:
    """An ESM-2, with its own tokenizer and token dropout unless ``config`` says otherwise."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    vocabulary = get_vocabulary("esm")
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary.tokens))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    ids = {"pad_token_id": vocabulary.pad, "mask_token_id": vocabulary.mask, "vocab_size": vocabulary.size}
    kinds = {"position_embedding_type": "rotary", "token_dropout": True, "layer_norm_eps": 1e-5}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _save(EsmForMaskedLM(EsmConfig(**SMALL | ids | kinds | dropouts | config)), folder)


def bert_folder(folder: Path, **config: Any) -> Path:
    """A BERT as ProtBert is: words are residues between spaces, absolute positions."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder.mkdir(parents=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *STANDARD_RESIDUES, *"XUBZO"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    return _save(BertForMaskedLM(BertConfig(**SMALL | {"vocab_size": len(tokens)} | config)), folder)


def megatron_bert_folder(folder: Path) -> Path:
    """A MegatronBert with ProteinLM's vocabulary, which has no end token; transformers runs it padded only."""
    from transformers import MegatronBertConfig, MegatronBertForMaskedLM

    folder.mkdir(parents=True)
    vocabulary = get_vocabulary("proteinlm")
    write_tokenizer(vocabulary, folder, num_positions=SMALL["max_position_embeddings"])
    ids = {"pad_token_id": vocabulary.pad, "vocab_size": vocabulary.size}
    return _save(MegatronBertForMaskedLM(MegatronBertConfig(**SMALL | ids)), folder)


def random_proteins(lengths: Sequence[int], seed: int = 3) -> list[bytes]:
    """Proteins of these lengths."""
    generator = np.random.default_rng(seed)
    letters = np.frombuffer(STANDARD_RESIDUES.encode(), dtype=np.uint8)
    return [generator.choice(letters, length).tobytes() for length in lengths]


def residue_ids(encoder: Encoder, proteins: Sequence[bytes]) -> list[np.ndarray]:
    """The ids of each protein's residues."""
    return [encode(encoder.vocabulary, protein) for protein in proteins]


def alone(folder: Path, text: str, with_spaces: bool = False, mask: Sequence[int] = (), **options: Any) -> Any:
    """What transformers' own model and tokenizer, with nothing of ours, make of one sequence.

    Args:
        folder: Model and tokenizer.
        text: The sequence.
        with_spaces: Put spaces between residues.
        mask: Residues, from 0, that are masked.
        options: For the model's forward, such as ``output_hidden_states``.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    encoded = tokenizer(" ".join(text) if with_spaces else text, return_tensors="pt")
    for place in mask:
        encoded["input_ids"][0, place + 1] = tokenizer.mask_token_id
    with torch.no_grad():
        return model(**encoded, **options)


def hidden_alone(folder: Path, text: str, with_spaces: bool = False) -> list[Tensor]:
    """Hidden states [num_tokens, hidden_size] of one sequence: what enters the first layer, then after each."""
    found = alone(folder, text, with_spaces, output_hidden_states=True)
    return [states[0] for states in found.hidden_states]
