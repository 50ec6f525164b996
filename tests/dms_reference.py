"""Eviction heads for tiny models, and a DMS model's forward pass by the rule alone, over the whole sequence at once."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from kvbench.dms import evict

MARGIN = 1e-3
"""Decisions closer than this to the border may fall either way by the last bits of a float32."""


@cache
def model(architecture: str) -> Any:
    """A tiny model that heads are attached to and taken from again; copy it where they stay."""
    return copy.deepcopy(tiny.model(architecture))


def heads(keep: float, window: int, seed: int = 0) -> evict.Heads:
    """Heads that decide like dice: each token is kept with probability ``keep``, about."""
    layers, kv_heads, hidden = (tiny.SIZES[k] for k in ("num_hidden_layers", "num_key_value_heads", "hidden_size"))
    made = evict.Heads(layers, kv_heads, hidden, window)
    made.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    made.bias.data.fill_(-float(torch.special.ndtri(torch.tensor(min(max(keep, 1e-9), 1 - 1e-9)))))
    if keep in (0, 1):
        made.weight.data.zero_()
        made.bias.data.fill_(1.0 - 2 * keep)
    return made.requires_grad_(False)


def adapter(folder: Path, made: evict.Heads, architecture: str = "Llama") -> Any:
    """Save an adapter of heads and a random LoRA into a folder; returns the model that it makes of the tiny one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    trained = get_peft_model(copy.deepcopy(tiny.model(architecture)), lora)
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    trained.save_pretrained(folder)
    evict.save(made, folder)
    return trained.merge_and_unload().requires_grad_(False)


class Reference:
    """Logits of a sequence, [batch, tokens, vocabulary], and what was decided on the way."""

    def __init__(self, model: Any, made: evict.Heads, ids: torch.Tensor, threshold: float = 0.0) -> None:
        self.threshold = threshold
        self.decisions: list[torch.Tensor] = []
        REFERENCES.append(self)
        with torch.no_grad(), evict.attached(model, made, "dms_reference"):
            self.logits = model(ids, use_cache=False).logits
        REFERENCES.pop()

    @property
    def marks(self) -> list[torch.Tensor]:
        """For each layer bool [batch, KV heads, tokens]."""
        return [evict.shifted(decision) > self.threshold for decision in self.decisions]

    def clear(self) -> bool:
        """Whether no decision is so close to the border that rounding decides it."""
        return all(bool(((decision - self.threshold).abs() > MARGIN).all()) for decision in self.decisions)


REFERENCES: list[Reference] = []


def attend(module: Any, query: Any, keys: Any, values: Any, *_: Any, scaling: float, dms: Any, **__: Any) -> Any:
    decided = dms.logits()
    REFERENCES[-1].decisions.append(decided)
    group = query.shape[1] // keys.shape[1]
    mask = evict.visible(
        evict.shifted(decided) > REFERENCES[-1].threshold,
        dms.heads.window,
        torch.arange(query.shape[2], device=query.device),
    )
    keys, values, mask = (part.repeat_interleave(group, 1) for part in (keys, values, mask))
    scores = (query @ keys.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("dms_reference", attend)
