"""Other libraries' models with random weights, run sequence by sequence: what ProteinBert is held against."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megaprot.pretrain.config import ModelConfig

# Every norm far from one and every bias far from zero, matrices large enough for attention to be far from uniform.
_STD = 0.15


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter anew, LayerNorm weights around one."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(part.weight) for part in module.modules() if isinstance(part, nn.LayerNorm)}
    for parameter in module.parameters():
        mean = 1.0 if id(parameter) in norms else 0.0
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, _STD, generator=generator))


def esm_for_masked_lm(model: ModelConfig, num_positions: int, seed: int = 3) -> nn.Module:
    """transformers' EsmForMaskedLM of this shape; learned positions follow its padding convention (pad + 1)."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.feed_forward_size,
        max_position_embeddings=num_positions + 2,
        position_embedding_type={"rotary": "rotary", "learned": "absolute"}[model.position_embedding],
        layer_norm_eps=model.layer_norm_epsilon,
        token_dropout=model.token_dropout,
        emb_layer_norm_before=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = EsmForMaskedLM(config).eval()
    randomise(theirs, seed)
    return theirs


def megatron_bert(
    model: ModelConfig, num_positions: int, vocabulary_size: int, activation: str, seed: int = 3
) -> nn.Module:
    """transformers' MegatronBertForMaskedLM of this shape, token types without effect."""
    from transformers import MegatronBertConfig, MegatronBertForMaskedLM

    config = MegatronBertConfig(
        vocab_size=vocabulary_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.feed_forward_size,
        max_position_embeddings=num_positions,
        hidden_act=activation,
        layer_norm_eps=model.layer_norm_epsilon,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = MegatronBertForMaskedLM(config).eval()
    randomise(theirs, seed)
    nn.init.zeros_(theirs.bert.embeddings.token_type_embeddings.weight)
    return theirs


@torch.no_grad()
def logits_alone(theirs: nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [tokens, vocabulary] of each sequence given to a transformers model by itself."""
    return [theirs(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]


@torch.no_grad()
def hidden_states_alone(theirs: nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Last hidden states [tokens, hidden_size] of each sequence given to a MegatronBert model by itself."""
    return [theirs.bert(input_ids=torch.tensor([sequence])).last_hidden_state[0] for sequence in sequences]
