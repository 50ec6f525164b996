"""The sizes of a decoder-only transformer, read from its config: what its bytes and operations follow from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from kvbench.errors import Unsupported

COUNTED = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types whose parameters are known in closed form; Phi3 fuses projections, which changes no count."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by the name of its dtype."""

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_KEYS = (
    *_SIZES,
    *("model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("sliding_window", "use_sliding_window"),
)


def describe(config: Any) -> dict[str, Any]:
    """What `Architecture.of` needs of a transformers config (the text part of a multimodal one), as plain values."""
    text = config.get_text_config()
    found = {key: getattr(text, key, None) for key in _KEYS}
    return {key: value for key, value in found.items() if value is not None}


def kv_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """KV heads and head_dim; a config that names neither means the query heads, and their share of the hidden size.

    Parameters
    ----------
    config : a checkpoint's ``config.json``, or `describe`.
    """
    heads = config["num_attention_heads"]
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, in tokens; None where a layer sees all.

    Source: transformers 5.2, ``DynamicCache`` and ``DynamicSlidingWindowLayer`` in ``cache_utils.py``.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else ""] * text.num_hidden_layers
    return [window if kind in ("sliding_attention", "chunked_attention") else None for kind in kinds]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model.

    Attributes
    ----------
    kind : transformers' ``model_type``.
    tied : whether the embedding table is also the output projection.
    attention_bias, mlp_bias : biases that the config asks for, where the kind has such a choice.
    window : how many tokens a sliding-window layer sees; None where every layer sees all.
    """

    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    window: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The sizes that a checkpoint's ``config.json`` gives, or `describe`.

        Raises
        ------
        Unsupported : the config lacks a size.
        """
        lacking = [key for key in ("model_type", *_SIZES) if config.get(key) is None]
        if lacking:
            raise Unsupported(f"the model's config has no {', '.join(lacking)}, so its bytes cannot be counted")
        kv_heads, head_dim = kv_shape(config)
        slides = config.get("use_sliding_window", True)
        return cls(
            kind=config["model_type"],
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            attention_bias=bool(config.get("attention_bias")),
            mlp_bias=bool(config.get("mlp_bias")),
            window=config.get("sliding_window") if slides else None,
        )

    @property
    def projections(self) -> int:
        """Elements of the matrices that every token is multiplied with: attention and MLP of all layers."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden  # query and output, key and value
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def vectors(self) -> int:
        """Elements of norms and biases.

        Raises
        ------
        Unsupported : the kind is none of `COUNTED`.
        """
        if self.kind not in COUNTED:
            raise Unsupported(f"the parameters of a {self.kind} are not known in closed form")
        queries_keys_values = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = 2 * self.hidden
        if self.kind == "qwen2":
            layer += queries_keys_values
        if self.kind == "qwen3":
            layer += 2 * self.head_dim
        if self.attention_bias and self.kind in ("llama", "qwen3"):
            layer += queries_keys_values + self.hidden
        if self.mlp_bias and self.kind == "llama":
            layer += 2 * self.intermediate + self.hidden
        return self.layers * layer + self.hidden

    @property
    def embedding(self) -> int:
        """Elements of the embedding table, and of the output projection."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of all weights; tied embeddings count once."""
        return self.projections + self.vectors + self.embedding * (1 if self.tied else 2)

    @property
    def kv_elements(self) -> int:
        """Elements of the keys and values of one token of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_dim
