"""The same arithmetic in fewer kernels: norms in one instead of seven, projections of one input as one product.

A norm of transformers reads and writes its input many times over, which is 0.3 s of a prefill of 64 × 1024 tokens
through 8 billion parameters. A decode step multiplies a few rows with every weight, so it takes as long as reading the
weights; a product over three matrices that lie behind each other reads them at a higher rate than three small ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that one module applies to one input, in the order in which it does."""

MODELS = {"llama", "mistral", "qwen2", "qwen3"}
"""Model types whose attention and MLP are known to do so, and whose norms are plain RMS norms."""


class _Group:
    """Weights behind each other, and the parts of the last product that are still to be taken."""

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent, self.names = parent, names
        self.own = [getattr(parent, name) for name in names]
        self.sizes = [linear.out_features for linear in self.own]
        self.weight = _behind_each_other([linear.weight for linear in self.own])
        self.bias = None if self.own[0].bias is None else torch.cat([linear.bias for linear in self.own])
        self.parts: list[torch.Tensor] = []
        self.calls = [_First(self), *(_Next(self) for _ in names[1:])]

    def use(self, modules: list[Any]) -> None:
        for name, module in zip(self.names, modules, strict=True):
            setattr(self.parent, name, module)


class _First(nn.Module):
    """The first projection of a group: computes all, returns its own part."""

    def __init__(self, group: _Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = functional.linear(x, self.group.weight, self.group.bias).split(self.group.sizes, dim=-1)
        self.group.parts = list(parts[1:])
        return parts[0]


class _Next(_First):
    """Another projection of a group: returns its part of what the first one computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.parts.pop(0)


def _behind_each_other(weights: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of which the given parameters become slices; their own storages are freed."""
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return whole


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


class Fused:
    """A model's norms and grouped projections in their fused forms, which two contexts swap in.

    The weights of a group are laid behind each other when this is made, with no more than one group's copy at a time;
    the model's own modules go on working, on slices. Other models than `MODELS` are left as they are.
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        known = list(model.modules()) if model.config.model_type in MODELS else []
        # each made once: a compiled step is compiled anew for a function that it has not seen
        self.norms = [
            (module, partial(_rms_norm, module)) for module in known if type(module).__name__.endswith("RMSNorm")
        ]
        self.groups = [
            _Group(module, names)
            for module in known
            for names in GROUPS
            if all(type(getattr(module, name, None)) is nn.Linear for name in names)
        ]

    @contextmanager
    def norms_applied(self) -> Iterator[None]:
        """The model with fused norms."""
        try:
            for norm, fused in self.norms:
                norm.forward = fused
            yield
        finally:
            for norm, _ in self.norms:
                del norm.forward

    @contextmanager
    def projections_applied(self) -> Iterator[None]:
        """The model with its grouped projections."""
        try:
            for group in self.groups:
                group.use(group.calls)
            yield
        finally:
            for group in self.groups:
                group.use(group.own)
