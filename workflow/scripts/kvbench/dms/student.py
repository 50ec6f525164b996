"""A model in training, and the frozen original that it learns to agree with."""

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kvbench.dms import evict, soft

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear map of a layer, in all architectures that DMS knows."""
LORA_SCALE = 2
"""What a LoRA's change is multiplied by: its alpha over its rank."""

Gate = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer's number and input to the `Penalties.scores` of its attention."""


class Student:
    """A model under eviction heads, and what of it is trained.

    Parameters
    ----------
    model : of an architecture that DMS knows, on its device; it is changed in place.
    window : positions that an evicted token stays readable.
    lora_rank : of a low-rank change of all projections; None for none. The original has the same weights, not copies.
    whole_model : whether every weight is trained, in float32; the original is then a second copy.
    seed : of the low-rank change.

    Attributes
    ----------
    heads : evict.Heads, zero at first.
    lora : the model in peft's wrapper, or None.
    trained : what is trained, by name: ``heads.…`` and the model's own names.
    net, original : the model's way to its hidden states and logits, and the original's.
    """

    def __init__(self, model: Any, window: int, lora_rank: int | None, whole_model: bool, seed: int) -> None:
        self.model = model.requires_grad_(False)
        self.window = window
        self.heads = evict.Heads(*evict.sizes(model.config), window).to(model.device)
        evict.check(model, self.heads)
        model.set_attn_implementation(soft.ATTENTION)
        # other modules over the same weights: to switch a LoRA off and on takes peft longer than a step may
        shared = {} if whole_model else {id(weight): weight for weight in model.parameters()}
        self.original = Net(copy.deepcopy(model, shared))
        if whole_model:
            model.float().requires_grad_(True)
        torch.manual_seed(seed)
        self.lora = _with_lora(model, lora_rank) if lora_rank else None
        self.net = Net(model)
        heads = {f"heads.{name}": value for name, value in self.heads.named_parameters()}
        self.trained = heads | {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._gates: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _gates
        if model.device.type == "cuda":
            importlib.import_module("kvbench.dms.soft_kernels")  # once, and not while a layer is traced
            self._gates = torch.compile(_gates, dynamic=False)

    def save_memory(self) -> None:
        """From now on compute the layers' activations again in the backward pass, and keep none."""
        self.net.saves_memory = True

    @torch.no_grad()
    def teach(self, ids: torch.Tensor, fast: bool = False) -> torch.Tensor:
        """The original's last hidden states, [batch, tokens, hidden], for ids int64 [batch, tokens].

        ``fast`` compiles, which pays for one shape that comes again and again.
        """
        return self.original.hidden(ids, fast)

    def learn(
        self, ids: torch.Tensor, temperature: torch.Tensor, whole: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's last hidden states under soft evictions, with gradient.

        Parameters
        ----------
        temperature : of the evictions, a scalar.
        whole : how many rows, the first, are read without evictions; a scalar.

        Returns
        -------
        Hidden states [batch, tokens, hidden], and α [layers, batch, KV heads, tokens].
        """
        weights, biases = self.heads.weight.unbind(0), self.heads.bias.unbind(0)
        evicted: list[torch.Tensor] = []

        def gate(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            if not hidden.requires_grad:
                hidden.requires_grad_()  # the first layer as the others, so that one compiled form serves all
            norm = self.model.model.layers[layer].input_layernorm
            alpha, penalty = self._gates(norm, hidden, weights[layer], biases[layer], temperature, whole)
            evicted.append(alpha)
            return penalty

        with self._gated(gate):
            hidden = self.net.hidden(ids, fast=True)
        return hidden, torch.stack(evicted)

    @torch.no_grad()
    def obey(self, ids: torch.Tensor, prefix: int) -> tuple[torch.Tensor, float]:
        """The model's last hidden states under evictions for good, and what they leave of a prefix.

        Returns
        -------
        Hidden states [batch, tokens, hidden], and the share of the first ``prefix`` tokens that a cache keeps of them,
        over all layers, heads and rows.
        """
        gone: list[torch.Tensor] = []
        judged = max(prefix - 1 - self.window, 0)  # older than the window of the prefix's last token

        def gate(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            normed = self.model.model.layers[layer].input_layernorm(hidden)
            marks = evict.shifted(self.heads.logits(layer, normed)) > 0
            gone.append(marks[..., :judged].sum() / marks[..., 0].numel())
            return torch.where(marks, soft.EVICTED, 0.0)

        with self._gated(gate):
            hidden = self.net.hidden(ids)
        return hidden, 1 - float(torch.stack(gone).mean()) / prefix

    @torch.no_grad()
    def ignore(self, ids: torch.Tensor) -> torch.Tensor:
        """The changed model's last hidden states without evictions, [batch, tokens, hidden]."""
        return self.net.hidden(ids)

    @contextmanager
    def _gated(self, gate: Gate) -> Iterator[None]:
        """Attention under the penalties that a gate gives for each layer's input."""

        def hand(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            scores = gate(layer.self_attn.layer_idx, args[0])
            return args, kwargs | {"soft": soft.Penalties(scores, self.window)}

        hooks = [layer.register_forward_pre_hook(hand, with_kwargs=True) for layer in self.net.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """The model as the artefact will hold it: what is trained of it, not the heads, rounded to bfloat16."""
        weights = [value for name, value in self.trained.items() if not name.startswith("heads.")]
        exact = [value.detach().clone() for value in weights]
        _copy(weights, [value.bfloat16() for value in exact])
        try:
            yield
        finally:
            _copy(weights, exact)


@torch.no_grad()
def _copy(into: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for place, value in zip(into, values, strict=True):
        place.copy_(value)


def _gates(
    norm: nn.Module,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    temperature: torch.Tensor,
    whole: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`soft.gates` from a layer's own input, and no penalty in the first ``whole`` rows."""
    alpha, penalty = soft.gates(norm(hidden), weight, bias, temperature)
    rows = torch.arange(len(penalty), device=penalty.device)
    return alpha, torch.where(rows[:, None, None] < whole, 0.0, penalty)


def _with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=LORA_SCALE * rank,
        target_modules=list(PROJECTIONS),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()


class Net:
    """A model's way from ids to last hidden states, and ``head``, the one from there to logits.

    On a GPU the layers are compiled, one form for all of them: nothing in it depends on which layer it is.
    """

    def __init__(self, model: Any) -> None:
        self.decoder, self.head = model.model, model.lm_head
        self.layers = model.model.layers
        self.saves_memory = False
        self._fast: list[Callable[..., Any]] = []

    def hidden(self, ids: torch.Tensor, fast: bool = False) -> torch.Tensor:
        """Last hidden states [batch, tokens, hidden]."""
        if not fast:
            return self.decoder(ids, use_cache=False).last_hidden_state
        for layer, forward in zip(self.layers, self._compiled(ids.device), strict=True):
            layer.forward = self._saving(forward) if torch.is_grad_enabled() else forward
        try:
            return self.decoder(ids, use_cache=False).last_hidden_state
        finally:
            for layer in self.layers:
                del layer.forward

    def _compiled(self, device: torch.device) -> list[Callable[..., Any]]:
        if not self._fast:
            plain = [layer.forward for layer in self.layers]
            self._fast = plain if device.type == "cpu" else [torch.compile(each, dynamic=False) for each in plain]
        return self._fast

    def _saving(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if not self.saves_memory:
            return forward
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
