"""A trained DMS adapter: eviction heads, and the low-rank change of the weights that goes with them."""

from pathlib import Path
from typing import Any

from kvbench.dms import evict
from kvbench.errors import UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def load(model: Any, folder: Path) -> evict.Heads:
    """Read an adapter, and merge its LoRA, where it has one, into the model's weights for good.

    Parameters
    ----------
    model : the base model that the adapter was trained for, on its device; it is changed in place.
    folder : holds ``dms_heads.safetensors`` and perhaps a LoRA in peft's format (``adapter_config.json``,
        ``adapter_model.safetensors``).

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
