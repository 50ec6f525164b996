"""A prompt's tokens sorted by head into those that stay and those marked for eviction."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Partition:
    """The order in which a head's tokens are read and stored: kept ones first, then marked ones, each by position.

    Attributes
    ----------
    order : int32 [batch, KV heads, tokens], the position of each token in this order.
    before : int32 [batch, KV heads, tokens + 1], how many kept tokens are at positions below each.
    """

    order: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(cls, marks: torch.Tensor) -> "Partition":
        """Sort by marks, bool [batch, KV heads, tokens]; nothing here waits for the device."""
        tokens = marks.shape[-1]
        before = torch.nn.functional.pad((~marks).cumsum(-1, dtype=torch.int32), (1, 0))
        position = torch.arange(tokens, dtype=torch.int32, device=marks.device)
        kept = before[..., -1:]
        place = torch.where(marks, kept + position - before[..., :-1], before[..., :-1])
        order = torch.empty_like(place).scatter_(-1, place.long(), position.expand_as(place))
        return cls(order, before)

    def kept(self) -> torch.Tensor:
        """How many tokens of each head are not marked, int32 [batch, KV heads]."""
        return self.before[..., -1]

    def gone(self, since: int) -> torch.Tensor:
        """How many tokens of each head at positions below ``since`` are marked, int32 [batch, KV heads]."""
        return since - self.before[..., since]
