"""The same arithmetic in fewer kernels: norms in one instead of seven, projections of one input as one product.

A norm of transformers reads and writes its input many times over, which is 0.3 s of a prefill of 64 × 1024 tokens
through 8 billion parameters. A decode step multiplies a few rows with every weight, so it takes as long as reading the
weights; a product over three matrices that lie behind each other reads them at a higher rate than three small ones.
Between its products a layer works on a few numbers a row, each time in a kernel that takes longer to start than to run:
`step_kernels` has four in place of some twenty.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbench import ragged
from kvbench.packed import PackedCache

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that one module applies to one input, in the order in which it does."""

MODELS = {"llama", "mistral", "qwen2", "qwen3"}
"""Model types whose layers, attention and MLP are known to be alike in that, and whose norms are plain RMS norms."""


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

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """All parts, behind each other in the last dimension."""
        return functional.linear(x, self.weight, self.bias)


class _First(nn.Module):
    """The first projection of a group: computes all, returns its own part."""

    def __init__(self, group: _Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.group.product(x).split(self.group.sizes, dim=-1)
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


def _attention(
    group: _Group,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: Any,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """One token's attention as transformers has it, with all between product and attention in one kernel."""
    from kvbench import step_kernels

    module: Any = group.parent
    norms = None
    if hasattr(module, "q_norm"):
        norms = module.q_norm.weight, module.k_norm.weight, module.q_norm.variance_epsilon
    cache, layer = past_key_values, module.layer_idx
    into = (cache.layers[layer], cache.step) if isinstance(cache, PackedCache) else None
    product, kv_heads = group.product(hidden_states), group.sizes[1] // module.head_dim
    query, keys, values = step_kernels.rotate(product, position_embeddings, kv_heads, norms, into)
    if into is None:
        keys, values = cache.update(keys, values, layer)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, weights = attend(module, query, keys, values, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs)
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _mlp(group: _Group, x: torch.Tensor) -> torch.Tensor:
    from kvbench import step_kernels

    module: Any = group.parent
    out: torch.Tensor = module.down_proj(step_kernels.gate(group.product(x)))
    return out


class _Layer:
    """One token through a decoder layer, in which each sum and the norm after it are one kernel.

    Parameters
    ----------
    after : the layer that comes next, whose first norm is taken with this one's last sum.
    """

    def __init__(self, module: Any, after: "_Layer | None") -> None:
        self.module, self.after = module, after
        self.normed: torch.Tensor | None = None

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        from kvbench import step_kernels

        normed, self.normed = self.normed, None
        if normed is None:
            normed = self.module.input_layernorm(hidden_states)
        attended, _ = self.module.self_attn(hidden_states=normed, **kwargs)
        norm = self.module.post_attention_layernorm
        hidden_states, normed = step_kernels.add_norm(hidden_states, attended, norm.weight, norm.variance_epsilon)
        out = self.module.mlp(normed)
        if self.after is None:
            return hidden_states + out
        norm = self.after.module.input_layernorm
        hidden_states, self.after.normed = step_kernels.add_norm(hidden_states, out, norm.weight, norm.variance_epsilon)
        return hidden_states


class Fused:
    """A model's norms, grouped projections and decode step in their fused forms, which three contexts swap in.

    The weights of a group are laid behind each other when this is made, with no more than one group's copy at a time;
    the model's own modules go on working, on slices. Other models than `MODELS` are left as they are.
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        known = list(model.modules()) if model.config.model_type in MODELS else []
        # each made once: a compiled step is compiled anew for a function that it has not seen
        self.norms: list[tuple[Any, Callable[..., Any]]] = [
            (module, partial(_rms_norm, module)) for module in known if type(module).__name__.endswith("RMSNorm")
        ]
        self.groups = [
            _Group(module, names)
            for module in known
            for names in GROUPS
            if all(type(getattr(module, name, None)) is nn.Linear for name in names)
        ]
        self.layers: list[_Layer] = []
        for module in reversed(model.model.layers if known else []):
            self.layers.append(_Layer(module, self.layers[-1] if self.layers else None))
        self.steps: list[tuple[Any, Callable[..., Any]]] = [(layer.module, layer) for layer in self.layers]
        self.steps += [(group.parent, partial(form, group)) for group in self.groups if (form := _form(group))]

    def norms_applied(self) -> AbstractContextManager[None]:
        """The model with fused norms."""
        return _forwards(self.norms)

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

    @contextmanager
    def kernels_applied(self) -> Iterator[None]:
        """The model as it takes one token a row, on CUDA and without gradient, over a cache that has had its prompt.

        Attention functions get a `PackedCache`'s keys and values with the token's own already stored. Modules that the
        kernels do not fit go on as they are: heads of other sizes, gates through another function than SiLU.
        """
        try:
            with _forwards(self.steps):
                yield
        finally:
            for layer in self.layers:
                layer.normed = None


def _form(group: _Group) -> Callable[..., Any] | None:
    """The fused forward of the module that a group is in, where there is one."""
    module: Any = group.parent
    if "q_proj" in group.names:
        return _attention if ragged.fits_kernel(module.head_dim) else None
    return _mlp if module.config.hidden_act in ("silu", "swish") else None


@contextmanager
def _forwards(forms: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Modules with other forward functions; their hooks stay."""
    try:
        for module, form in forms:
            module.forward = form
        yield
    finally:
        for module, _ in forms:
            del module.forward
