"""Prompts of different lengths, batched so that each gets the tokens that it would get alone.

No press reads a padding mask: pads are scored, kept and attended to as if they were text. So prompts are read with
others of exactly their length, where no pad is needed, and by a method whose rows depend on one another one at a time.
What is left in their caches can then be decoded together: each row's slots that hold nothing are hidden from it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kvbench import decode, engines, packed
from kvbench.architecture import Architecture, describe
from kvbench.errors import Unsupported
from kvbench.kept import kept
from kvbench.methods import Dense

TOKENS_AT_ONCE = {"cpu": 16_384, "cuda": 65_536}
"""Prompt tokens of a batch by the kind of device, at most, unless one prompt has more."""

SHARE_OF_MEMORY = 0.25
"""How much of what a GPU's memory holds besides the weights a batch's cache and activations may take."""


@dataclass(frozen=True)
class Row:
    """What a prompt was answered with, and whether what its cache lost was only hidden, as `Kept` has it."""

    tokens: list[int]
    simulated: bool


def generate_rows(
    model: Any, prompts: Sequence[Sequence[int]], method: Dense, new_tokens: int, stop: Collection[int] = ()
) -> list[Row | Unsupported]:
    """Greedy decoding of prompts of any lengths, each as if it were alone.

    Parameters
    ----------
    prompts : token ids; `unpadded` takes them out of a padded batch.
    new_tokens : tokens generated for each, at most.
    stop : ids that end a row; the one that did is kept.

    Returns
    -------
    In the prompts' order, the new tokens of each, or why the method refuses it (shorter than its window, say).
    """
    found: dict[int, Row | Unsupported] = {}
    at_once = tokens_at_once(model)
    groups = equal_lengths([(len(prompt),) for prompt in prompts], method, at_once)
    waiting: list[_Prefilled] = []
    joins = _joins(model, method)
    for group in tqdm(groups, desc="prompts", unit="batch", mininterval=1.0):
        ids = torch.tensor([list(prompts[place]) for place in group], device=model.device)
        try:
            first, cache = decode.prefill(model, ids, method)
            position = method.next_position(ids.shape[1], cache)
            if joins and _packs(model, cache):
                simulated = kept(model, cache, *ids.shape).simulated
                waiting.append(_Prefilled(group, ids.shape[1], first, cache, position, simulated))
            else:
                tokens = decode.follow(model, cache, first, method, position, new_tokens, stop=stop)
                state = kept(model, cache, len(group), ids.shape[1] + tokens.shape[1] - 1)
                found |= _answered(group, tokens, stop, state.simulated)
        except Unsupported as error:
            found |= dict.fromkeys(group, error)
        if sum(len(each.places) * each.length for each in waiting) >= at_once:
            found |= _together(model, method, waiting, new_tokens, stop)
            waiting = []
    found |= _together(model, method, waiting, new_tokens, stop)
    return [found[place] for place in range(len(prompts))]


def tokens_at_once(model: Any) -> int:
    """Prompt tokens that may be read together: on a GPU a power of two that its memory has room for.

    It follows from the card's size and not from what is free, so that batches, and with them the rounding of their
    sums, are the same in every run.
    """
    most, least = TOKENS_AT_ONCE[model.device.type], TOKENS_AT_ONCE["cpu"]
    if model.device.type == "cpu":
        return most
    try:
        sizes = Architecture.of(describe(model.config))
    except Unsupported:
        return least
    # a layer's activations live one layer at a time: the hidden states, and what gate, up and their product hold
    numbers = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim + 8 * sizes.hidden + 3 * sizes.intermediate
    room = torch.cuda.get_device_properties(model.device).total_memory - model.get_memory_footprint()
    fits = int(SHARE_OF_MEMORY * room / (numbers * model.dtype.itemsize))
    return min(most, max(least, 1 << max(fits, 1).bit_length() - 1))


def equal_lengths(shapes: Sequence[tuple[int, ...]], method: Dense, at_once: int) -> list[list[int]]:
    """Places of the prompts that may share a batch.

    Parameters
    ----------
    shapes : the lengths of each prompt's parts, or of the whole: what shares a batch has the same.
    at_once : tokens of a batch, `tokens_at_once`.

    Returns
    -------
    Groups of places in ``shapes``, of one place each where the method's rows depend on one another.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(place)
    groups = []
    for shape, places in alike.items():
        rows = max(1, at_once // max(1, sum(shape))) if method.rows_are_independent else 1
        groups += [places[i : i + rows] for i in range(0, len(places), rows)]
    return groups


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    """The prompts of a padded batch, whichever side it is padded on.

    Parameters
    ----------
    input_ids, attention_mask : int64 [batch, prompt tokens]; the mask is 0 at pads.
    """
    return [row[kept].tolist() for row, kept in zip(input_ids, attention_mask.bool(), strict=True)]


def until_end(tokens: list[int], stop: Collection[int]) -> list[int]:
    """A row's tokens up to the one that ended it, included; what a batch decoded for the others' sake is left off."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop), tokens)


@dataclass(frozen=True)
class _Prefilled:
    """A batch of equal lengths after its prefill: which prompts, their length, the first token, the cache."""

    places: list[int]
    length: int
    first: torch.Tensor
    cache: Any
    position: int
    simulated: bool


def _joins(model: Any, method: Dense) -> bool:
    """Whether this method's prompts can be decoded together, if their caches can."""
    try:
        packed.check(model)
    except Unsupported:
        return False
    return method.packs


def _packs(model: Any, cache: Any) -> bool:
    try:
        packed.check_cache(model, cache)
    except Unsupported:
        return False
    return True


def _together(
    model: Any, method: Dense, waiting: list[_Prefilled], new_tokens: int, stop: Collection[int]
) -> dict[int, Row | Unsupported]:
    """Answers of several prefilled batches, decoded as one."""
    if not waiting:
        return {}
    firsts, caches, positions = zip(*((each.first, each.cache, each.position) for each in waiting), strict=True)
    tokens = engines.decode_together(model, method, list(firsts), list(caches), list(positions), new_tokens, stop)
    found: dict[int, Row | Unsupported] = {}
    for each, own in zip(waiting, tokens.split([len(each.places) for each in waiting]), strict=True):
        found |= _answered(each.places, own, stop, each.simulated)
    return found


def _answered(places: list[int], tokens: torch.Tensor, stop: Collection[int], simulated: bool) -> dict[int, Row]:
    return {place: Row(until_end(row, stop), simulated) for place, row in zip(places, tokens.tolist(), strict=True)}
