"""Who is evicted: a linear head a layer, one decision a token and KV head, carried out a window later.

The rule, which everything else here follows:

- The head of token t+1 decides about token t (a token is judged when its successor has been seen, as in NVIDIA's code).
- A token marked for eviction stays readable to the queries at most ``window`` positions after it; later ones do not
  see it. So the last ``window`` + 1 tokens are always there, the query's own among them.

Source: arXiv 2506.05345, section 3; NVIDIA Model-Optimizer, ``experimental/dms`` (scale, offset and the shift by one).
There the head reads the layer's input through an RMS norm of its own. Here it reads the attention's input (which the
layer has normed) scaled to unit length, so that a head needs no norm to be trained and works at any scale of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from kvbench import packed
from kvbench.dms import layout
from kvbench.errors import Unsupported, UserError

SCALE = 100.0
"""What multiplies a head's raw decision, so that a small weight decides clearly."""
OFFSET = 5.0
"""What is taken off then: a zero head, which every retrofit starts from, evicts nothing."""

FILE = layout.HEADS
KIND = "kvbench DMS heads, version 1"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class Heads(nn.Module):
    """The eviction heads of a model.

    Parameters
    ----------
    layers, kv_heads, hidden : the model's sizes.
    window : how many positions an evicted token stays readable; at least 1.
    about : what is known of their making, all strings (``base_model``, ``base_revision``, ``base_sha256``).

    Attributes
    ----------
    weight : float32 [layers, KV heads, hidden], zero at first.
    bias : float32 [layers, KV heads], zero at first.
    """

    def __init__(
        self, layers: int, kv_heads: int, hidden: int, window: int, about: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"a DMS window of {window} tokens", "Give a window of at least 1")
        self.window = window
        self.about = about or {}
        self.weight = nn.Parameter(torch.zeros(layers, kv_heads, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, kv_heads))

    def logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What each token says about the one before it: above 0 evicts it.

        Parameters
        ----------
        hidden : the attention's input, [batch, tokens, hidden].

        Returns
        -------
        float32 [batch, KV heads, tokens], also under autocast; differentiable.
        """
        return decide(hidden, self.weight[layer], self.bias[layer])


def decide(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`Heads.logits` of one layer, from its weight [KV heads, hidden] and bias [KV heads]."""
    with torch.autocast(hidden.device.type, enabled=False):
        unit = functional.normalize(hidden.float(), dim=-1)
        raw = functional.linear(unit, weight, bias)
    return (raw * SCALE - OFFSET).transpose(1, 2)


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """Logits *about* each token instead of *of* each token, same shape; −inf for the last, not yet judged."""
    return functional.pad(logits[..., 1:], (0, 1), value=float("-inf"))


def visible(marks: torch.Tensor, window: int, queries: torch.Tensor) -> torch.Tensor:
    """Which keys a query may read.

    Parameters
    ----------
    marks : bool [batch, KV heads, tokens], the tokens marked for eviction; ``shifted(logits) > 0``.
    queries : int64 [queries], the positions of the queries; the keys are at positions 0 … tokens−1.

    Returns
    -------
    bool [batch, KV heads, queries, tokens].
    """
    age = queries[:, None] - torch.arange(marks.shape[-1], device=marks.device)
    return (age >= 0) & (~marks[:, :, None, :] | (age <= window))


class LayerInput(NamedTuple):
    """What an attention function finds in its keyword ``dms`` while heads are attached.

    Attributes
    ----------
    hidden : the attention's input, [batch, tokens, hidden].
    cache : the forward's ``past_key_values``, or None.
    """

    heads: Heads
    layer: int
    hidden: torch.Tensor
    cache: Any

    def logits(self) -> torch.Tensor:
        """`Heads.logits` of this layer, float32 [batch, KV heads, tokens], with gradient."""
        return self.heads.logits(self.layer, self.hidden)


def attach(model: Any, heads: Heads) -> list[Any]:
    """Hand every attention of a model its `LayerInput`; returns the hooks' handles, each with a ``remove``.

    Attention functions other than DMS's own ignore the keyword, so a model with heads attached runs as before under
    them.

    Raises
    ------
    Unsupported : an architecture whose layers are not known to fit.
    UserError : heads that were made for other sizes.
    """
    check(model, heads)

    def hand(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = LayerInput(heads, module.layer_idx, kwargs["hidden_states"], kwargs.get("past_key_values"))
        return args, kwargs | {"dms": given}

    return [layer.self_attn.register_forward_pre_hook(hand, with_kwargs=True) for layer in model.model.layers]


@contextmanager
def attached(model: Any, heads: Heads, attention: str) -> Iterator[None]:
    """A model with heads attached and an attention function, registered with transformers, that reads them."""
    handles = attach(model, heads)
    try:
        with packed.attention(model, attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


def check_kind(kind: str | None, name: str = "this one") -> None:
    """Raise `Unsupported` for a ``model_type`` that DMS does not know."""
    if kind not in MODEL_TYPES:
        raise Unsupported(f"DMS knows {', '.join(MODEL_TYPES)} models; {name} is {kind}")


def check(model: Any, heads: Heads) -> None:
    """Raise what `attach` raises."""
    config = model.config
    check_kind(config.model_type)
    wanted, found = sizes(config), tuple(heads.weight.shape)
    if wanted != found:
        words = "{} layers × {} KV heads × {} hidden"
        raise Unsupported(
            f"these eviction heads are for {words.format(*found)}, and the model has {words.format(*wanted)}: they were"
            " trained for another one"
        )


def sizes(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and hidden size of a model."""
    return config.num_hidden_layers, config.num_key_value_heads, config.hidden_size


def save(heads: Heads, folder: Path) -> None:
    """Write the heads as safetensors, with the window and what is known of their making as metadata."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().float().cpu().contiguous() for name, value in heads.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={**heads.about, "kind": KIND, "window": str(heads.window)})


def load(folder: Path) -> Heads:
    """Read the heads that `save` wrote, on the CPU.

    Raises
    ------
    UserError : there are none, or the file is another thing.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        raise UserError(f"no {FILE} in {folder}", "Give the folder of a DMS adapter, as the retrofit writes it")
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            if about.pop("kind", None) != KIND:
                raise UserError(f"{path} does not hold eviction heads", "Give the folder of a DMS adapter")
            tensors = {name: file.get_tensor(name) for name in ("weight", "bias")}
            layers, kv_heads, hidden = tensors["weight"].shape
            heads = Heads(layers, kv_heads, hidden, int(about.pop("window")), about)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}", "Fetch or train the adapter again") from error
    heads.load_state_dict(tensors)
    return heads.requires_grad_(False)
