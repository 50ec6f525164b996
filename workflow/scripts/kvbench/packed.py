"""A static cache that one decode step can be captured over: kept tokens packed first, then room for the new ones.

transformers' dynamic cache copies every key and value at every step, and each step launches hundreds of kernels; at
batch 64 that, not the cache's bytes, sets the speed. Here a step writes one slot and reads the rest in place, its
shapes never change, and on a GPU it is replayed as one CUDA graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench import ragged
from kvbench.errors import Unsupported
from kvbench.ragged import BLOCK, UNIT

ATTENTION = "kvbench_packed"
"""Name under which the attention of a decode step is registered with transformers."""

ALIGNMENT = BLOCK
"""Slots are padded to whole blocks; torch's attention wants masks whose rows are aligned, too."""


class Mask:
    """Which slots a step may read; shared by all layers that keep equally many tokens.

    Attributes
    ----------
    bias : additive, [batch or 1, KV heads or 1, 1, slots]; 0 where a slot may be read, −inf elsewhere. Only without a
        table.
    table : where `ragged.attend_paged` finds the slots, counted from a layer's keys; None where heads hold different
        numbers of tokens, with gaps before the new ones, and without a kernel.
    held : int64 [batch, KV heads], slots that may be read, in the order of the table.
    """

    def __init__(self, like: torch.Tensor, kept: int, slots: int, lengths: torch.Tensor | None) -> None:
        rows, heads, _, head_dim = like.shape
        self.kept = kept
        self.lengths = lengths
        self.table: torch.Tensor | None = None
        if lengths is None and like.is_cuda and ragged.fits_kernel(head_dim):
            blocks = torch.arange(rows * heads * slots // BLOCK, device=like.device).view(rows, heads, -1)
            self.table = blocks * (BLOCK * head_dim * like.itemsize // UNIT)
            self.held = torch.zeros(rows, heads, dtype=torch.long, device=like.device)
            return
        self.places = torch.arange(slots, device=like.device)
        self.old = self.places < (kept if lengths is None else lengths[:, :, None, None])
        self.bias = torch.zeros(
            (1, 1, 1, slots) if lengths is None else self.old.shape, dtype=like.dtype, device=like.device
        )

    def admit(self, step: torch.Tensor) -> None:
        """Admit the kept tokens and the new ones up to ``step`` (int64 [1])."""
        if self.table is not None:
            self.held.copy_(step + (self.kept + 1))
            return
        new = (self.places >= self.kept) & (self.places <= self.kept + step)
        self.bias.copy_(torch.where(self.old | new, 0.0, float("-inf")))


class PackedLayer:
    """Keys and values of one layer.

    Attributes
    ----------
    keys, values : [batch, KV heads, slots, head_dim]; the prompt's kept tokens in slots 0 … kept−1, new token i in slot
        kept + i, then padding.
    """

    def __init__(self, like: torch.Tensor, slots: int, mask: Mask) -> None:
        rows, heads, self.kept, head_dim = like.shape
        self.keys = like.new_zeros(rows, heads, slots, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.mask = mask

    def take(self, layer: Any) -> None:
        """Copy the kept tokens of a dynamic cache's layer, and free them there."""
        self.keys[:, :, : self.kept].copy_(layer.keys)
        self.values[:, :, : self.kept].copy_(layer.values)
        layer.keys = layer.values = None


class Together:
    """Compressed caches of several batches as one: rows behind each other, the shorter ones padded at their end.

    Attributes
    ----------
    layers : with ``keys`` and ``values``, [all rows, KV heads, the most kept of any, head_dim].
    lengths : for each layer int64 [all rows, KV heads], how many of these slots are kept tokens.
    """

    def __init__(self, caches: list[Any]) -> None:
        self.layers: list[Any] = []
        self.lengths: list[torch.Tensor] = []
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            kept = [layer.keys.shape[2] for layer in layers]
            keys, values = (
                torch.cat([_padded(getattr(layer, name), max(kept)) for layer in layers]) for name in ("keys", "values")
            )
            self.layers.append(SimpleNamespace(keys=keys, values=values))
            counts = [
                layer.keys.new_full(layer.keys.shape[:2], count, dtype=torch.long)
                for layer, count in zip(layers, kept, strict=True)
            ]
            self.lengths.append(torch.cat(counts))


def _padded(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    return functional.pad(tensor, (0, 0, 0, slots - tensor.shape[2]))


class PackedCache:
    """Static layers, and the step at which the next token goes in; what transformers' forward asks of a cache.

    Parameters
    ----------
    cache : a compressed dynamic cache, which is emptied into this one.
    new_tokens : how many are to be decoded after it.
    lengths : for each layer int64 [batch, KV heads], how many of its kept slots a head really holds; None where every
        head holds all of them.
    """

    is_compileable = True

    def __init__(self, cache: Any, new_tokens: int, lengths: list[torch.Tensor] | None = None) -> None:
        self.masks: dict[int, Mask] = {}
        self.layers: list[PackedLayer] = []
        self.step = torch.zeros(1, dtype=torch.long, device=cache.layers[0].keys.device)
        for index, layer in enumerate(cache.layers):
            kept = layer.keys.shape[2]
            slots = -(-(kept + new_tokens) // ALIGNMENT) * ALIGNMENT
            key = index if lengths else kept
            if key not in self.masks:
                self.masks[key] = Mask(layer.keys, kept, slots, lengths[index] if lengths else None)
            self.layers.append(PackedLayer(layer.keys, slots, self.masks[key]))
            self.layers[-1].take(layer)  # one layer after the other, so that the two caches are never both whole

    def fits(self, cache: Any) -> bool:
        """Whether a compressed cache has the shapes that this one was made for."""
        return all(
            layer.keys.shape[:2] == packed.keys.shape[:2] and layer.keys.shape[2] == packed.kept
            for layer, packed in zip(cache.layers, self.layers, strict=True)
        )

    def fill(self, cache: Any) -> None:
        """Take the tokens of another cache of the same shapes; back to the first step."""
        for layer, packed in zip(cache.layers, self.layers, strict=True):
            packed.take(layer)
        self.step.zero_()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, _: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token's keys and values, [batch, KV heads, 1, head_dim], and return all slots."""
        layer = self.layers[layer_idx]
        slot = self.step + layer.kept
        layer.keys.index_copy_(2, slot, keys)
        layer.values.index_copy_(2, slot, values)
        return layer.keys, layer.values

    def reserve(self) -> None:
        """What the engine calls before a step; here every slot is there from the start."""

    def rewind(self) -> None:
        """Back to the first step."""
        self.step.zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Kept tokens of a layer."""
        return int(self.layers[layer_idx].kept)

    def live_bytes(self) -> int:
        """Bytes of the tokens that are held now, without the room for those to come."""
        step, held = int(self.step), 0
        for layer in self.layers:
            rows, heads, _, head_dim = layer.keys.shape
            kept = rows * heads * layer.kept if layer.mask.lengths is None else int(layer.mask.lengths.sum())
            held += 2 * (kept + rows * heads * step) * head_dim * layer.keys.itemsize
        return held

    def admit(self) -> None:
        """Let every layer's mask admit the tokens up to the current step."""
        for mask in self.masks.values():
            mask.admit(self.step)


def attend(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: PackedCache | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one decode step over a packed cache.

    Queries that share a KV head are folded into the query axis, so that keys and values are read once and never
    repeated.

    Parameters
    ----------
    query : [batch, heads, 1, head_dim].
    keys, values : [batch, KV heads, slots, head_dim].
    packed : the cache whose masks apply; ``attention_mask`` and ``dropout`` are only part of the interface.

    Returns
    -------
    [batch, 1, heads, head_dim], and no weights.
    """
    assert packed is not None
    rows, heads, _one, head_dim = query.shape
    layer = packed.layers[module.layer_idx]
    if layer.mask.table is not None:
        scale = head_dim**-0.5 if scaling is None else scaling
        return attend_slots(query, keys, values, layer.mask.table, layer.mask.held, scale).transpose(1, 2), None
    kv_heads = keys.shape[1]
    folded = query.view(rows, kv_heads, heads // kv_heads, head_dim)
    mask = layer.mask.bias
    out = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, head_dim), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


@torch.library.custom_op("kvbench::attend_slots", mutates_args=())
def attend_slots(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    held: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`ragged.attend_paged` over packed slots, on CUDA; opaque to torch.compile.

    torch's fused attention gives one program a whole row of keys, and a batch of a few long rows then fills a part of
    the device only.

    Parameters
    ----------
    query : [batch, heads, 1, head_dim].
    keys, values : [batch, KV heads, slots, head_dim].
    table, held : those of `Mask`.

    Returns
    -------
    [batch, heads, 1, head_dim].
    """
    offset = (values.data_ptr() - keys.data_ptr()) // keys.itemsize
    return ragged.attend_paged(query.contiguous(), keys, table, held, offset, scale)


@attend_slots.register_fake
def _(query: torch.Tensor, *_args: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """The model with another attention kernel."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check(model: Any) -> None:
    """Raise `Unsupported` for a model that a packed cache would get wrong."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    ):
        raise Unsupported("a packed cache holds every token, and this model has sliding-window layers; use engine: hf")


def check_cache(model: Any, cache: Any) -> None:
    """Raise `Unsupported` for a compressed cache that is more than plain keys and values."""
    if any(hasattr(layer, "_quantized_keys") for layer in cache.layers):
        raise Unsupported("a quantized cache cannot be packed; use engine: hf")
    if any(getattr(module, "masked_key_indices", None) is not None for module in model.modules()):
        raise Unsupported("this press masks keys through kvpress's own attention; use engine: hf")
