"""A trained DMS adapter: eviction heads, and the change of the weights that goes with them."""

from pathlib import Path
from typing import Any

import torch

from kvbench.dms import evict
from kvbench.errors import UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
WHOLE = "model.safetensors"


def load(model: Any, folder: Path) -> evict.Heads:
    """Read an adapter, and change the model's weights for good: by its LoRA, or to its own, where it has either.

    Parameters
    ----------
    model : the base model that the adapter was trained for, on its device; it is changed in place.
    folder : holds ``dms_heads.safetensors`` and perhaps a LoRA in peft's format (``adapter_config.json``,
        ``adapter_model.safetensors``), or all the weights (``model.safetensors``).

    Returns
    -------
    The heads, on the model's device.

    Raises
    ------
    UserError : the folder holds no heads, half a LoRA, or an adapter for another model.
    Unsupported : an architecture that DMS does not know.
    """
    heads = evict.load(folder)
    evict.check(model, heads)
    found = [name for name in (WEIGHTS, CONFIG) if (folder / name).is_file()]
    if len(found) == 1:
        raise UserError(f"{folder} has {found[0]} without its other half", f"Keep {WEIGHTS} and {CONFIG} together")
    if found:
        _merge(model, folder)
    if (folder / WHOLE).is_file():
        _replace(model, folder / WHOLE)
    return heads.to(model.device)


def _merge(model: Any, folder: Path) -> None:
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"the LoRA in {folder} does not fit the model: {first}", "Use the adapter that was trained for it"
        ) from error
    assert merged is model, "peft gives the model back that it was given"


def _replace(model: Any, path: Path) -> None:
    """Give the model the weights of a file, each once: what is tied stays tied."""
    from safetensors.torch import load_file

    weights, places = load_file(path), dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in places.items()}:
        raise UserError(f"{path} holds the weights of another model", "Use the adapter that was trained for it")
    with torch.no_grad():
        for name, value in weights.items():
            places[name].copy_(value)
