"""What lies in the folder of an adapter, and where that folder is; needs nothing heavy, so that a config can ask."""

from pathlib import Path

HEADS = "dms_heads.safetensors"
"""The eviction heads."""
LORA = "adapter_model.safetensors"
"""A LoRA, in peft's format; with it `LORA_CONFIG`."""
LORA_CONFIG = "adapter_config.json"
WHOLE = "model.safetensors"
"""All weights of the model, in place of a LoRA."""

KVBENCH = Path(__file__).parents[4]
"""Where adapters that come with kvbench are looked for: the folder of the Snakefile."""


def find(folder: Path) -> Path:
    """The folder in the working directory, or else the one of that name that comes with kvbench, if there is one."""
    shipped = KVBENCH / folder
    return shipped if not folder.exists() and shipped.is_dir() else folder


def contents(folder: Path) -> list[Path]:
    """The files of an adapter that a method reads; its model card is none."""
    found = (find(folder) / name for name in (HEADS, LORA, LORA_CONFIG, WHOLE))
    return [path for path in found if path.is_file()]


def problem(folder: Path) -> str | None:
    """What is wrong with an adapter's folder, without a look into its files; None for a whole one."""
    names = {path.name for path in contents(folder)}
    if HEADS not in names:
        return f"no {HEADS} in {str(folder)!r}"
    halves = names & {LORA, LORA_CONFIG}
    if len(halves) == 1:
        return f"{str(folder)!r} has {halves.pop()} without its other half; keep {LORA} and {LORA_CONFIG} together"
    return None
