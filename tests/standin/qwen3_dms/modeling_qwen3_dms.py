"""Model of the stand-in: Qwen3 whose attention evicts, and which puts its own cache in place of any other."""

from typing import Any

import torch
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .configuration_qwen3_dms import Qwen3Config
from .dms_attention import dms_attention
from .dms_cache import DMSCache


class Qwen3Attention(qwen3.Qwen3Attention):
    """The last channel of a group's first query head is no query: it decides about the token before."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        rows, tokens = hidden_states.shape[:2]
        queries, keys, values = (
            project(hidden_states).view(rows, tokens, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys, values = (
            self.q_norm(queries).transpose(1, 2),
            self.k_norm(keys).transpose(1, 2),
            values.transpose(1, 2),
        )
        deciding, config = slice(None, None, self.num_key_value_groups), self.config
        logits = queries[:, deciding, :, -1] * config.dms_alpha_scale - config.dms_initial_alpha_offset
        decisions = (logits > 0).to(logits.dtype)
        queries[:, deciding, :, -1] = 0
        queries, keys = qwen3.apply_rotary_pos_emb(queries, keys, *position_embeddings)
        queries[:, deciding, :, -1] = 0
        out = dms_attention(
            queries,
            keys,
            values,
            decisions,
            attention_mask,
            self.layer_idx,
            past_key_values,
            self.scaling,
            config.dms_window_size,
        )
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1)), None


class Qwen3Model(qwen3.Qwen3Model):
    """Qwen3's, with that attention."""

    config_class = Qwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = Qwen3Attention(config, i)
        self.post_init()

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        if not isinstance(past_key_values, DMSCache):
            past_key_values = DMSCache(
                dms_window_size=self.config.dms_window_size + 1, max_context_length=self.config.max_position_embeddings
            )
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


class Qwen3ForCausalLM(qwen3.Qwen3ForCausalLM):
    """Named as the checkpoint's own."""

    config_class = Qwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen3Model(config)
        self.post_init()
