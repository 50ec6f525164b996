"""One layer of the compact cache: its blocks, and the books that say what is in them."""

from collections.abc import Iterator
from typing import Any

import torch

from kvbench.dms.partition import Partition
from kvbench.ragged import BLOCK, UNIT

_ANCHORS: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def anchor(like: torch.Tensor) -> torch.Tensor:
    """The tensor from which block addresses are counted: one for each device and dtype, for as long as we run.

    Addresses then mean the same in every cache, and a kernel reaches any block from one typed pointer.
    """
    key = (like.device, like.dtype)
    if key not in _ANCHORS:
        _ANCHORS[key] = torch.zeros(UNIT, dtype=like.dtype, device=like.device)
    return _ANCHORS[key]


class Layer:
    """Keys and values of one layer, ragged over (row, KV head).

    A slot is the place of a token within its head: slot s is in the head's block s // 16. Slots 0 … length−1 are
    filled, in any order: positions are in the keys.

    Attributes
    ----------
    chunks : tensors [blocks, 2, 16, head_dim]; each block holds 16 keys, then their values.
    table : int64 [batch, KV heads, blocks], the addresses of each head's blocks, in units of `UNIT` bytes.
    blocks : int64 [batch, KV heads], how many blocks a head has.
    lengths : int64 [batch, KV heads], how many slots are filled.
    ring : int32 [batch, KV heads, window + 1]; entry t mod (window + 1) is the slot s of the token at position t, or
        −1−s once it is marked, for the last window + 1 tokens.
    free : int64 [batch, KV heads], the slot whose token leaves the window at the next step and was marked: the next
        token takes it, and nobody reads it again; −1 where there is none.
    position : int64 [batch, KV heads], of the next token.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, parts: Partition, window: int, room: int) -> None:
        """Store what a prompt leaves behind; the host waits once, to learn how many blocks that takes.

        Parameters
        ----------
        keys, values : [batch, KV heads, tokens, head_dim] of the whole prompt.
        room : for how many tokens a head the table has entries.
        """
        rows, heads, tokens, _ = keys.shape
        oldest = max(tokens - 1 - window, 0)  # from here on every token is still readable
        gone = parts.gone(oldest).long()
        self.lengths = tokens - gone
        self.blocks = torch.zeros_like(self.lengths)
        self.table = self.lengths.new_zeros(rows, heads, ceil_div(room, BLOCK))
        self.position = torch.full_like(self.lengths, tokens)
        self.chunks: list[torch.Tensor] = []
        need = ceil_div(self.lengths, BLOCK)
        owner, within = owners(need, int(need.sum()))
        chunk = _stored(keys, values, parts, gone, owner, within)
        self.enter(owner * self.table.shape[-1] + within, addresses(chunk), need, chunk)
        self._open_window(parts, gone, window, oldest)

    def _open_window(self, parts: Partition, gone: torch.Tensor, window: int, oldest: int) -> None:
        tokens, width = parts.order.shape[-1], window + 1
        position = torch.arange(oldest, tokens, device=gone.device)
        before, after = parts.before[..., oldest:-1].long(), parts.before[..., oldest + 1 :].long()
        marked_slot = parts.kept()[..., None] + position - before - gone[..., None]
        entry = torch.where(after > before, before, -1 - marked_slot)
        self.ring = torch.zeros(*gone.shape, width, dtype=torch.int32, device=gone.device)
        self.ring[..., position % width] = entry.int()
        self.free = self._leaving()

    def _leaving(self) -> torch.Tensor:
        entry = self.ring.gather(-1, self._at(0)).squeeze(-1).long()
        return torch.where(entry < 0, -1 - entry, -1)

    def _at(self, offset: int) -> torch.Tensor:
        return ((self.position + offset) % self.ring.shape[-1])[..., None]

    def enter(self, entry: torch.Tensor, address: torch.Tensor, need: torch.Tensor, chunk: torch.Tensor) -> None:
        """Own the blocks of a chunk: their addresses to entries of the flat table, ``need`` more to each head."""
        self.table.view(-1)[entry] = address
        self.blocks += need
        self.chunks.append(chunk)

    def widen(self, blocks: int) -> None:
        """Give the table entries for this many blocks a head, at least; one that has them stays the tensor it is."""
        more = blocks - self.table.shape[-1]
        if more > 0:
            self.table = torch.nn.functional.pad(self.table, (0, more))

    def append(self, keys: torch.Tensor, values: torch.Tensor, evict: torch.Tensor) -> None:
        """Take one token, [batch, KV heads, 1, head_dim], and its word on the token before it, bool [batch, KV heads].

        The plain form of what the kernel does.
        """
        slot = torch.where(self.free >= 0, self.free, self.lengths)
        self._write(slot, keys[:, :, 0], values[:, :, 0])
        before = self.ring.gather(-1, self._at(-1))
        self.ring.scatter_(-1, self._at(-1), torch.where(evict[..., None], -1 - before, before))
        self.ring.scatter_(-1, self._at(0), slot[..., None].int())
        self.lengths += self.free < 0
        self.position += 1
        self.free.copy_(self._leaving())

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values padded to the longest head, [batch, KV heads, longest, head_dim]; copies, for the host."""
        slots = torch.arange(int(self.lengths.max()), device=self.lengths.device).expand(*self.lengths.shape, -1)
        shape = (*slots.shape, self.chunks[0].shape[-1])
        keys, values = self.chunks[0].new_zeros(shape), self.chunks[0].new_zeros(shape)
        for lines, row, inside in self._lines(slots):
            keys[inside], values[inside] = lines[row], lines[row + BLOCK]
        return keys, values

    def _write(self, slot: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        for lines, row, inside in self._lines(slot[..., None]):
            lines[row], lines[row + BLOCK] = keys[inside[..., 0]], values[inside[..., 0]]

    def _lines(self, slots: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each chunk its lines of head_dim numbers, which of them hold keys of these slots, and of which slots."""
        address = self.table.gather(-1, (slots // BLOCK).clamp(max=self.table.shape[-1] - 1))
        for chunk in self.chunks:
            size = chunk[0].nbytes // UNIT
            block = address - _first(chunk)
            inside = (block >= 0) & (block < size * len(chunk))
            yield chunk.view(-1, chunk.shape[-1]), (block // size * 2 * BLOCK + slots % BLOCK)[inside], inside

    def books(self) -> tuple[torch.Tensor, ...]:
        """What a step changes, apart from the blocks."""
        return self.lengths, self.ring, self.free, self.position

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that this layer holds on the device."""
        return [*self.chunks, self.table, self.blocks, *self.books()]


def _stored(
    keys: torch.Tensor,
    values: torch.Tensor,
    parts: Partition,
    gone: torch.Tensor,
    owner: torch.Tensor,
    within: torch.Tensor,
) -> torch.Tensor:
    """The blocks of what a prompt leaves, of which head ``owner`` each and as its how-many-eth, as a new chunk."""
    rows, heads, tokens, head_dim = keys.shape
    slot = within[:, None] * BLOCK + torch.arange(BLOCK, device=keys.device)
    kept, gone = parts.kept().flatten()[owner, None], gone.flatten()[owner, None]
    # slots past a head's length repeat its last token: any number will do that is finite
    place = torch.where(slot < kept, slot, slot + gone).clamp_(max=tokens - 1)
    token = parts.order.view(rows * heads, tokens)[owner[:, None], place].long()
    row, head = owner[:, None] // heads, owner[:, None] % heads
    chunk = keys.new_empty(len(owner), 2, BLOCK, head_dim)
    chunk[:, 0] = keys[row, head, token]
    chunk[:, 1] = values[row, head, token]
    return chunk


def coming(
    lengths: torch.Tensor, ring: torch.Tensor, position: torch.Tensor, blocks: torch.Tensor, steps: int
) -> torch.Tensor:
    """How many more blocks each head needs for the next ``steps`` ≤ window steps, int64 [layers, batch, KV heads].

    Exact, as every token that leaves in these steps has been judged.

    Parameters
    ----------
    lengths, ring, position, blocks : those of `Layer`, stacked.
    """
    width = ring.shape[-1]
    turn = (torch.arange(width, device=ring.device) - position[..., None]) % width
    grows = ((turn < steps) & (ring >= 0)).sum(-1)
    return (ceil_div(lengths + grows, BLOCK) - blocks).clamp(min=0)


def addresses(chunk: torch.Tensor) -> torch.Tensor:
    """Where each block of a chunk lies, int64 [blocks], in units of `UNIT` bytes from the anchor."""
    return _first(chunk) + chunk[0].nbytes // UNIT * torch.arange(len(chunk), device=chunk.device)


def _first(chunk: torch.Tensor) -> int:
    return (chunk.data_ptr() - anchor(chunk).data_ptr()) // UNIT


def owners(need: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``total`` blocks, dealt out in order: which head gets each, and as its how-many-eth; int64 [total] both."""
    need = need.flatten()
    heads = torch.arange(len(need), device=need.device)
    owner = torch.repeat_interleave(heads, need, output_size=total)
    first = need.cumsum(0) - need
    return owner, torch.arange(total, device=need.device) - first[owner]


def ceil_div(a: Any, b: int) -> Any:
    """A number or tensor divided by b, rounded up."""
    return -(-a // b)
