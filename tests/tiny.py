"""Tiny random models of each architecture that kvpress supports: right in shape, done in milliseconds."""

from functools import cache
from typing import Any

import torch

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@cache
def model(architecture: str = "Llama") -> Any:
    """A model in float32 on the CPU with seeded weights."""
    import transformers

    extra = {"head_dim": 16} if architecture in ("Qwen3", "Mistral") else {}
    extra |= {"sliding_window": None} if architecture in ("Mistral", "Phi3") else {}
    config = getattr(transformers, f"{architecture}Config")(**SIZES, **extra)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # all ones would give keys that are normed one length, and KnormPress nothing but ties
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return made


def sliding(window: int) -> Any:
    """A Mistral whose layers see ``window`` tokens."""
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(**SIZES, head_dim=16, sliding_window=window)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [rows, tokens]."""
    return torch.randint(1, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))
