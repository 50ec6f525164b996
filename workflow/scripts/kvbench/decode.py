"""Our own decode loop over transformers' forward: greedy, deterministic, and blind to who times it."""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvbench import masks
from kvbench.errors import Unsupported
from kvbench.methods import Dense


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Decoded:
    """What a run left.

    Attributes
    ----------
    tokens : int64 [batch, new tokens] on the model's device.
    cache : the cache after the last step.
    """

    tokens: torch.Tensor
    cache: Any


@torch.no_grad()
def prefill(model: Any, input_ids: torch.Tensor, method: Dense) -> tuple[torch.Tensor, Any]:
    """Run the prompts through the model and compress their cache.

    Only the last position's logits are computed: at 64 × 1024 tokens and a vocabulary of 152k all of them would
    take 12.5 GiB.

    Parameters
    ----------
    input_ids : int64 [batch, prompt tokens], all rows of equal length.

    Returns
    -------
    The first new token of each row, int64 [batch, 1], and the compressed cache.
    """
    method.must_fit(model, input_ids.shape[1])
    cache = method.cache(model)
    return _fill(model, input_ids, method, cache), cache


def _fill(model: Any, input_ids: torch.Tensor, method: Dense, cache: Any) -> torch.Tensor:
    with method.prefill(model):
        output = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    must_be_given(output.past_key_values, cache)
    return output.logits[:, -1:].argmax(-1)


def must_be_given(found: Any, cache: Any) -> None:
    """Raise `Unsupported` where a model has read into another cache than the one that it was given."""
    if found is not cache:
        kinds = type(found).__name__, type(cache).__name__
        raise Unsupported(f"the model's own code put a {kinds[0]} in place of the {kinds[1]} that this method reads")


class _Recording(DynamicCache):
    """A cache that keeps a copy of every layer as it was before a press pruned it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.full = DynamicCache(config=config)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.full.update(key_states, value_states, layer_idx, cache_kwargs)
        return super().update(key_states, value_states, layer_idx, cache_kwargs)


@torch.no_grad()
def prefill_both(model: Any, input_ids: torch.Tensor, method: Dense) -> tuple[Any, Any]:
    """The full and the compressed cache of the same prompts, from one forward pass where that is exact.

    Parameters
    ----------
    input_ids : int64 [batch, prompt tokens], all rows of equal length.
    """
    if not method.shares_prefill:
        _, full = prefill(model, input_ids, Dense())
        return full, prefill(model, input_ids, method)[1]
    method.must_fit(model, input_ids.shape[1])
    recording = _Recording(model.config)
    _fill(model, input_ids, method, recording)
    compressed = DynamicCache(config=model.config)
    compressed.layers = recording.layers
    return recording.full, compressed


Mark = Callable[[], None]
Prefilled = Callable[[Any], None]


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    method: Dense,
    new_tokens: int,
    mark: Mark = _nothing,
    prefilled: Prefilled | None = None,
    stop: Collection[int] = (),
) -> Decoded:
    """Greedy decoding of exactly ``new_tokens`` tokens a row, or until every row has ended.

    Parameters
    ----------
    input_ids : int64 [batch, prompt tokens], all rows of equal length.
    mark : called before the prefill, after the first token and after every step, so ``new_tokens`` + 1 times; it
        may record a device event but nothing here waits for the device.
    prefilled : called once with the compressed cache, between the first token's mark and the first step.
    stop : end-of-sequence ids; given any, the host looks at every token, so leave it empty when timing.
    """
    method.must_fit(model, input_ids.shape[1] + new_tokens - 1)
    mark()
    token, cache = prefill(model, input_ids, method)
    mark()
    if prefilled is not None:
        prefilled(cache)
    position = method.next_position(input_ids.shape[1], cache)
    return Decoded(follow(model, cache, token, method, position, new_tokens, mark, stop), cache)


@torch.no_grad()
def answer(
    model: Any, cache: Any, ids: torch.Tensor, method: Dense, position: int, new_tokens: int, stop: Collection[int] = ()
) -> torch.Tensor:
    """Greedy decoding after given tokens that are read over a compressed cache.

    Parameters
    ----------
    cache, ids, position : as `continue_from` takes them.
    new_tokens, stop : as `generate` takes them.

    Returns
    -------
    The new tokens, int64 [batch, new tokens].
    """
    first = continue_from(model, cache, ids, method, position)[:, -1:].argmax(-1)
    return follow(model, cache, first, method, position + ids.shape[1], new_tokens, stop=stop)


@torch.no_grad()
def follow(
    model: Any,
    cache: Any,
    first: torch.Tensor,
    method: Dense,
    position: int,
    new_tokens: int,
    mark: Mark = _nothing,
    stop: Collection[int] = (),
) -> torch.Tensor:
    """Greedy decoding from a prefill's first new token on.

    Parameters
    ----------
    cache : as `prefill` left it.
    first : int64 [batch, 1], at ``position``.
    new_tokens, mark, stop : as `generate` takes them, the first token counted; ``mark`` is called after every step.

    Returns
    -------
    The new tokens, ``first`` among them, int64 [batch, at most ``new_tokens``].
    """
    method.must_fit(model, position + new_tokens - 1)
    tokens = torch.empty(len(first), new_tokens, dtype=torch.long, device=first.device)
    tokens[:, :1] = token = first
    position_ids = torch.full_like(token[:1], position)
    endings = torch.tensor(sorted(stop), device=tokens.device)
    ended = torch.isin(token, endings)
    length = 1
    own_masks = masks.one_is_wrong(model, cache)
    with method.decoding(model):
        while length < tokens.shape[1] and not (len(stop) and bool(ended.all())):
            with masks.each_its_own(model, cache, 1) if own_masks else nullcontext():
                logits = model(token, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            tokens[:, length : length + 1] = token
            length += 1
            mark()
            position_ids = position_ids + 1
            if len(stop):
                ended |= torch.isin(token, endings)
    return tokens[:, :length]


@torch.no_grad()
def continue_from(model: Any, cache: Any, ids: torch.Tensor, method: Dense, position: int) -> torch.Tensor:
    """Read given tokens after a compressed cache: what the model predicts at each, teacher-forced.

    One forward pass, or step by step where the method acts while decoding.

    Parameters
    ----------
    cache : as `prefill` left it; the tokens are added to it.
    ids : int64 [batch, tokens].
    position : of the first of them; ``method.next_position(prompt tokens, cache)``.

    Returns
    -------
    Logits [batch, tokens, vocabulary]; those at token i predict token i + 1.
    """
    method.must_fit(model, position + ids.shape[1])
    positions = position + torch.arange(ids.shape[1], device=ids.device)[None]
    if not method.acts_while_decoding and _one_pass(model, cache):
        with masks.each_its_own(model, cache, ids.shape[1]):
            return model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
    with method.decoding(model):
        steps = [
            model(token, position_ids=place, past_key_values=cache, use_cache=True).logits
            for token, place in zip(ids.split(1, 1), positions.split(1, 1), strict=True)
        ]
    return torch.cat(steps, 1)


def _one_pass(model: Any, cache: Any) -> bool:
    # a sliding layer counts its tokens in its own way, and flash attention takes no mask of hidden keys
    sliding = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    return not sliding and not ("flash" in model.config._attn_implementation and masks.hides(model))
