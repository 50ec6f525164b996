"""A trained DMS adapter: eviction heads, and the change of the weights that goes with them."""

from pathlib import Path
from typing import Any

import torch

from kvbench.dms import evict, layout
from kvbench.errors import Unsupported, UserError


def load(model: Any, folder: Path, threshold: float = 0.0) -> evict.Heads:
    """Read an adapter, and change the model's weights for good: by its LoRA, or to its own, where it has either.

    Parameters
    ----------
    model : the base model that the adapter was trained for, on its device; it is changed in place.
    folder : holds eviction heads and perhaps a LoRA or all the weights, under the names of `layout`.
    threshold : the logit above which a head evicts as it was trained; above 0 more is kept, below 0 less.

    Returns
    -------
    The heads, on the model's device, with the threshold in their bias: theirs is 0 again.

    Raises
    ------
    UserError : the folder holds no heads, or half a LoRA.
    Unsupported : an architecture that DMS does not know, or an adapter for another model.
    """
    if problem := layout.problem(folder):
        raise UserError(problem, "Give the folder of a DMS adapter, as the retrofit writes it")
    heads = evict.load(folder)
    evict.check(model, heads)
    if (folder / layout.LORA).is_file():
        _merge(model, folder)
    if (folder / layout.WHOLE).is_file():
        _replace(model, folder / layout.WHOLE)
    heads.bias.sub_(threshold / evict.SCALE)
    return heads.to(model.device)


def _merge(model: Any, folder: Path) -> None:
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise Unsupported(f"the LoRA in {folder} was trained for another model: {first}") from error
    assert merged is model, "peft gives the model back that it was given"


def _replace(model: Any, path: Path) -> None:
    """Give the model the weights of a file, each once: what is tied stays tied."""
    from safetensors.torch import load_file

    weights, places = load_file(path), dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in places.items()}:
        raise Unsupported(f"{path} holds the weights of another model")
    with torch.no_grad():
        for name, value in weights.items():
            places[name].copy_(value)
