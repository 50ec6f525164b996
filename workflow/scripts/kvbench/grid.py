"""What a config asks for: its variants and its cells."""

from dataclasses import dataclass

from kvbench import files
from kvbench.config import Config
from kvbench.dms import layout
from kvbench.options import Dms, DmsMethod, PressMethod


@dataclass(frozen=True)
class Variant:
    """A model with a method: one bar of the plot.

    Attributes
    ----------
    label : the method's name, with the model's before it where the method alone would be ambiguous.
    source_of_tokens : the model whose tokenizer and token ids it uses (its base, or itself).
    baseline : label of the uncompressed variant it is compared with; None if the config has none.
    """

    model: str
    method: str
    label: str
    source_of_tokens: str
    baseline: str | None


@dataclass(frozen=True)
class Cell:
    """A variant on a workload: one thing to measure."""

    variant: Variant
    workload: str


def variants(config: Config) -> list[Variant]:
    """Every variant of a config, in the order in which models and methods are listed."""
    if config.variants == "all":
        pairs = [(m, k) for m in config.models for k in config.methods if config.fits(m, k)]
    else:
        pairs = [(pair.model, pair.method) for pair in config.variants]
    methods = [method for _, method in pairs]
    labels = {(m, k): k if methods.count(k) == 1 else f"{m}/{k}" for m, k in pairs}
    found = []
    for model, method in pairs:
        base = config.models[model].base or model
        plain = [labels[m, k] for m, k in pairs if config.methods[k] == "none" and m in (model, base)]
        found.append(Variant(model, method, labels[model, method], base, plain[0] if plain else None))
    return found


def cells(config: Config) -> list[Cell]:
    """Every cell of a config: its variants on its workloads."""
    return [Cell(variant, workload) for variant in variants(config) for workload in config.workloads]


def method_spec(config: Config, method: str) -> dict[str, object]:
    """A method as plain JSON values: ``{}`` for none, ``{"press": …, "args": …}`` or ``{"dms": {…}}``.

    A press has ``kept_tokens`` and an adapter ``threshold`` only where it is set, so that results without it stay what
    they are. A retrofit is named by the folder of its adapter, another adapter also by the hashes of its ``files``.
    """
    spec = config.methods[method]
    if isinstance(spec, DmsMethod):
        return {"dms": _dms_spec(config, spec.dms)}
    dumped = spec.model_dump(mode="json") if isinstance(spec, PressMethod) else {}
    return {key: value for key, value in dumped.items() if value is not None}


def _dms_spec(config: Config, dms: Dms) -> dict[str, object]:
    threshold = {"threshold": dms.threshold} if dms.threshold else {}
    if dms.retrofit is not None:
        return {"adapter": adapter_folder(config, dms.retrofit), **threshold}
    if dms.adapter is not None:
        hashes = {path.name: files.sha256(path) for path in layout.contents(dms.adapter)}
        return {"adapter": str(dms.adapter), "files": hashes, **threshold}
    return dms.model_dump(mode="json", exclude={"threshold"})


def adapter_folder(config: Config, retrofit: str) -> str:
    """Where the adapter of a retrofit lies."""
    return f"{config.results}/retrofit/{retrofit}/adapter"


def plan(config: Config) -> dict[str, object]:
    """The whole run as plain JSON values: the resolved config and every cell with its sizes."""
    listed = []
    for cell in cells(config):
        variant, workload = cell.variant, config.workloads[cell.workload]
        listed.append(
            {
                "model": variant.model,
                "method": variant.method,
                "variant": variant.label,
                "baseline": variant.baseline,
                "workload": cell.workload,
                "batch_size": workload.batch_size,
                "prompt_tokens": workload.prompt_tokens,
                "new_tokens": workload.new_tokens,
            }
        )
    return {
        "config": config.model_dump(mode="json"),
        "protocol": config.protocol.model_dump(),
        "cells": listed,
    }
