"""Cache of the stand-in: blocks taken ahead, a length for every row and head, slots of the evicted used again."""

import functools
import math
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class DMSPagedCacheLayer(CacheLayerMixin):
    """One layer; tokens of row r and head h are those of sequence r × heads + h.

    ``recent_info`` is a ring of the last tokens: each one's slot, and whether its successor marked it for eviction. A
    new token takes the slot of the one that leaves the ring, if that one is marked, or the next free slot.
    """

    is_sliding = False

    def __init__(
        self,
        dms_window_size: int,
        max_context_length: int,
        block_size: int = 256,
        growth_factor: float = 1.5,
        accomodate_min_initial_context_length: int = 4096,
    ) -> None:
        super().__init__()
        assert block_size <= dms_window_size
        self.block_size, self.dms_window_size, self.growth_factor = block_size, dms_window_size, growth_factor
        self.min_initial_context_length = accomodate_min_initial_context_length
        self.max_context_length = max_context_length
        self.max_blocks_per_sequence = math.ceil(max_context_length / block_size)
        self.key_blocks: Any = None
        self.value_blocks: Any = None
        self.block_table: Any = None
        self.free_page_ids: Any = None
        self.cache_seq_lengths: Any = None
        self.recent_info: Any = None
        self.recent_info_position: Any = None
        self.device: Any = None
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, *_: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, _tokens, self.head_dim = key_states.shape
        self.page_batch = self.batch_size * self.num_heads
        blocks = max(1, math.ceil(self.min_initial_context_length / self.block_size)) * self.page_batch
        whole = {"dtype": torch.int32, "device": self.device}
        self.key_blocks = key_states.new_zeros(blocks, self.block_size, 1, self.head_dim)
        self.value_blocks = torch.zeros_like(self.key_blocks)
        self.block_table = torch.full((self.page_batch, self.max_blocks_per_sequence + 1), -1, **whole)
        self.free_page_ids = torch.arange(blocks, **whole)
        self.cache_seq_lengths = torch.zeros(self.page_batch, **whole)
        self.recent_info = torch.zeros(self.page_batch, self.dms_window_size, 2, **whole)
        self.recent_info_position = torch.zeros(self.page_batch, **whole)
        self._open_blocks(torch.arange(self.page_batch, device=self.device))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: Any = None) -> Any:
        """Take tokens [batch, heads, tokens, head_dim], each row's at its end; ``sequence_lengths`` says how many."""
        if self.key_blocks is None:
            self.lazy_initialization(key_states)
        elif key_states.shape[2] > 1:
            raise NotImplementedError("one prefill, then a token at a time")
        tokens = key_states.shape[2]
        shape = (self.page_batch, tokens)
        lengths = cache_kwargs["sequence_lengths"]
        counts = torch.full(shape[:1], tokens) if lengths is None else lengths.reshape(-1).cpu()
        keys, values = (x.reshape(*shape, self.head_dim) for x in (key_states, value_states))
        decisions = cache_kwargs["eviction_info"].reshape(shape)
        for i in range(tokens):
            sequences = torch.nonzero(i >= tokens - counts)[:, 0].to(self.device)
            self._add(sequences, keys[sequences, i], values[sequences, i], decisions[sequences, i])
        self.cumulative_length += cache_kwargs["cumulative_length"]
        return None, None

    def _add(self, sequences: Any, keys: torch.Tensor, values: torch.Tensor, decisions: torch.Tensor) -> None:
        ring, window = self.recent_info, self.dms_window_size
        place = self.recent_info_position[sequences] % window
        length = self.cache_seq_lengths[sequences]
        leaves = ring[sequences, place, 1] == 1
        slot = torch.where(leaves, ring[sequences, place, 0], length)
        ring[sequences, (place - 1) % window, 1] = decisions.to(torch.int32) * (length > 0)
        ring[sequences, place] = torch.stack([slot, torch.zeros_like(slot)], -1)
        block = self.block_table[sequences, slot // self.block_size]
        self.key_blocks[block, slot % self.block_size, 0] = keys
        self.value_blocks[block, slot % self.block_size, 0] = values
        self.recent_info_position[sequences] += 1
        self.cache_seq_lengths[sequences] += (~leaves).to(torch.int32)
        filled = ~leaves & (self.cache_seq_lengths[sequences] % self.block_size == 0)
        self._open_blocks(sequences[filled])

    def _open_blocks(self, sequences: torch.Tensor) -> None:
        while len(self.free_page_ids) < len(sequences):
            before = len(self.key_blocks)
            more = math.ceil(before * self.growth_factor) - before
            for name in ("key_blocks", "value_blocks"):
                blocks = getattr(self, name)
                setattr(self, name, torch.cat([blocks, blocks.new_zeros(more, *blocks.shape[1:])]))
            new = torch.arange(before, before + more, dtype=torch.int32, device=self.device)
            self.free_page_ids = torch.cat([self.free_page_ids, new])
        taken, self.free_page_ids = self.free_page_ids.tensor_split([len(sequences)])
        self.block_table[sequences, self.cache_seq_lengths[sequences] // self.block_size] = taken

    def get_seq_length(self, *_: Any) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        return self.cumulative_length + cache_position.shape[0], 0

    def get_max_cache_shape(self) -> int:
        return self.max_context_length


class DMSCache(Cache):
    """All layers, made when first written to."""

    def __init__(
        self,
        dms_window_size: int,
        max_context_length: int,
        accomodate_min_initial_context_length: int = 2048,
        block_size: int = 256,
    ) -> None:
        layer = functools.partial(
            DMSPagedCacheLayer,
            dms_window_size=dms_window_size,
            max_context_length=max_context_length,
            accomodate_min_initial_context_length=accomodate_min_initial_context_length,
            block_size=block_size,
        )
        super().__init__(layer_class_to_replicate=layer)

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __getitem__(self, layer_idx: int) -> DMSPagedCacheLayer:
        return self.layers[layer_idx]
