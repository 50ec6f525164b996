"""A cache that keeps what is not evicted and gives the rest of the bytes back: ragged, paged, of static shapes.

Heads keep very different numbers of tokens, so each (row, KV head) has its own list of blocks of 16 tokens: at most 15
slots of each are empty, however uneven the heads are, and a head grows by a block without moving a token. (A buffer
padded to the longest head would hold several times what is kept; one contiguous piece a head would have to be copied
to grow, or be given at once all that it may ever need.) A block may lie anywhere: its address is a number in a table
on the device, so new blocks can be added under a captured CUDA graph.

A decode step frees one token of a head or none: the one that leaves the window. If it was marked, the new token takes
its slot; if not, the head is one token longer. Both are decided on the device, with no word to the host. Whether a
token is marked is known a window before it leaves, so the blocks that the next steps will need are known too: the host
looks once in `HORIZON` steps and adds exactly these.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from kvbench.dms.layer import Layer, addresses, ceil_div, coming, owners
from kvbench.dms.partition import Partition
from kvbench.ragged import BLOCK

HORIZON = 64
"""Steps that blocks are added for at once, or the window, where that is shorter."""


class CompactCache:
    """What a DMS model keeps of a batch; one prompt, then single tokens.

    Rows may be at different positions (`join`), heads hold different numbers of tokens.

    Parameters
    ----------
    window : positions that an evicted token stays readable.

    Attributes
    ----------
    layers : in the model's order, as far as the prompt has come; their tables are equally wide.
    step : int64 [1], how many tokens were decoded; the engine's to count, like the packed cache's.
    """

    is_compileable = True

    def __init__(self, window: int) -> None:
        self.window = window
        self.layers: list[Layer] = []
        self.step = torch.zeros(1, dtype=torch.long)
        self.seen = self._prompt = 0
        self._ahead = 0
        self._start: list[tuple[torch.Tensor, ...]] = []

    def take(self, keys: torch.Tensor, values: torch.Tensor, parts: Partition) -> None:
        """Keep of the next layer's prompt what a later token may read, [batch, KV heads, tokens, head_dim]."""
        self.seen = keys.shape[2]
        self.step = self.step.to(keys.device)
        self.layers.append(Layer(keys, values, parts, self.window, self.seen + HORIZON))

    def holds(self, layer: int) -> bool:
        """Whether a layer has had its prompt."""
        return layer < len(self.layers)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, _: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What transformers calls before attention; here attention itself stores, as it knows who is evicted."""
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the longest row has had, evicted ones too: the position of its next one."""
        return self.seen

    def reserve(self) -> None:
        """Make sure that there is a slot for the next token; call it once before every step, outside the graph."""
        if self._ahead == 0:
            self._ahead = min(HORIZON, self.window)
            self._extend()
        self._ahead -= 1
        self.seen += 1

    def _extend(self) -> None:
        names = ("lengths", "ring", "position", "blocks")
        lengths, ring, position, have = (torch.stack([getattr(layer, name) for layer in self.layers]) for name in names)
        need = coming(lengths, ring, position, have, self._ahead)
        *counts, widest = torch.cat([need.sum((1, 2)), (need + have).max()[None]]).tolist()
        if not any(counts):
            return
        for layer in self.layers:
            layer.widen(widest)
        chunk = self.layers[0].chunks[0]
        fresh = chunk.new_zeros(sum(counts), *chunk.shape[1:])
        owner, within = owners(need, len(fresh))
        width, heads = self.layers[0].table.shape[-1], need[0].numel()
        entry = (owner % heads * width + have.flatten()[owner] + within).split(counts)
        address, parts = addresses(fresh).split(counts), fresh.split(counts)
        for layer, *given in zip(self.layers, entry, address, need, parts, strict=True):
            if len(given[0]):
                layer.enter(*given)

    def pack(self, new_tokens: int) -> None:
        """Give the tables their final width, so that no shape changes in ``new_tokens`` tokens."""
        for layer in self.layers:
            layer.widen(ceil_div(self.seen + new_tokens + HORIZON, BLOCK))
        self._prompt = self.seen
        self._start = [tuple(book.clone() for book in layer.books()) for layer in self.layers]

    def rewind(self) -> None:
        """Back to the end of the prompt, as `pack` or `fill` found it; the blocks added since stay.

        After one step that is exact: its token is written again to the same slot. After more, slots that were used
        again hold later tokens, so what is then decoded is as much work and means nothing.
        """
        self.step.zero_()
        self._ahead, self.seen = 0, self._prompt
        for layer, start in zip(self.layers, self._start, strict=True):
            for book, then in zip(layer.books(), start, strict=True):
                book.copy_(then)

    def fits(self, other: Any) -> bool:
        """Whether another prompt's cache has the shapes of this one."""
        return (
            isinstance(other, CompactCache)
            and other.window == self.window
            and other.seen <= self._prompt  # what is decoded after a longer one would outgrow the tables
            and len(other.layers) == len(self.layers)
            and all(
                new.lengths.shape == mine.lengths.shape and new.table.shape[-1] <= mine.table.shape[-1]
                for new, mine in zip(other.layers, self.layers, strict=True)
            )
        )

    def fill(self, other: "CompactCache") -> None:
        """Take over another prompt's blocks, in the same tables, and rewind to its end; it is used up.

        No key or value is copied.
        """
        for mine, new in zip(self.layers, other.layers, strict=True):
            mine.chunks = new.chunks
            mine.table[..., : new.table.shape[-1]] = new.table
            mine.blocks.copy_(new.blocks)
        self._prompt = other.seen
        self._start = [layer.books() for layer in other.layers]
        self.rewind()

    def admit(self) -> None:
        """What the engine calls at the start of a step; nothing here is masked by it."""

    def kept_fraction(self) -> float:
        """Kept tokens by tokens seen, over all layers, rows and heads; what was achieved, windows included."""
        held = sum(int(layer.lengths.sum()) for layer in self.layers)
        return held / sum(int(layer.position.sum()) for layer in self.layers)

    def live_bytes(self) -> int:
        """Bytes of the keys and values of kept tokens."""
        return sum(int(layer.lengths.sum()) * 2 * layer.chunks[0][0, 0, 0].nbytes for layer in self.layers)


def join(caches: Sequence[CompactCache]) -> CompactCache:
    """One cache of the rows of several, whose prompts may differ in length; no key or value is copied.

    Parameters
    ----------
    caches : of one model and window, after their prompts or later; they are used up.
    """
    joined = CompactCache(caches[0].window)
    joined.step = caches[0].step
    joined.seen = max(cache.seen for cache in caches)
    joined._ahead = min(cache._ahead for cache in caches)
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        layer = object.__new__(Layer)
        width = max(part.table.shape[-1] for part in parts)
        layer.chunks = [chunk for part in parts for chunk in part.chunks]
        layer.table = torch.cat([functional.pad(part.table, (0, width - part.table.shape[-1])) for part in parts])
        for name in ("blocks", "lengths", "ring", "free", "position"):
            setattr(layer, name, torch.cat([getattr(part, name) for part in parts]))
        joined.layers.append(layer)
    return joined
