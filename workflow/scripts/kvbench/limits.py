"""A cell beside its limits: what it must do by count, what its device can do, and how near to that it came."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbench.architecture import ITEMSIZE, Architecture
from kvbench.errors import Unsupported
from kvbench.roofline import Rates, Work, fastest, mbu, mean_decode_step, mfu, prefill

COLUMNS = (
    "fastest_ttft_s fastest_tpot_s prefill_bytes prefill_flops decode_step_bytes decode_step_flops copy_bytes_per_s"
    " matmul_flops_per_s"
).split()
"""Columns that say what a cell must do, what its device does, and the times that follow."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The work of a cell and the rates of its device.

    Attributes
    ----------
    prefill : None where DMS skips what it has evicted, so that what attention multiplies has no closed form.
    decode : the mean decode step; None where a press compresses now and then while decoding, so that what a step
        finds in the cache has no closed form.
    dtype : name of the dtype of weights and cache.
    """

    prefill: Work | None
    decode: Work | None
    rates: Rates
    dtype: str

    def of_repeat(self, ttft_s: float | None, tpot_s: float | None) -> Row:
        """`COLUMNS`, which are the same for every repeat, and what this repeat reached: its MFU and MBU."""
        rates, dtype, prompt, decode = self.rates, self.dtype, self.prefill, self.decode
        return {
            "fastest_ttft_s": prompt and fastest(prompt, rates, dtype),
            "fastest_tpot_s": decode and fastest(decode, rates, dtype),
            "prefill_bytes": prompt and prompt.bytes,
            "prefill_flops": prompt and prompt.flops,
            "decode_step_bytes": decode and decode.bytes,
            "decode_step_flops": decode and decode.flops,
            "copy_bytes_per_s": rates.copy_bytes_per_s,
            "matmul_flops_per_s": rates.matmul_flops_per_s[dtype],
            "mfu": mfu(prompt, ttft_s, rates, dtype) if prompt and ttft_s else None,
            "mbu": mbu(decode, tpot_s, rates) if decode and tpot_s else None,
        }


def of_cell(cell: Mapping[str, Any], cache: Row, facts: Row, rates: Mapping[str, Rates]) -> Limits | None:
    """The limits of a cell; None where its job told no config, its weights have no closed form, or its device no rates.

    Parameters
    ----------
    cell : ``batch_size``, ``prompt_tokens`` and ``new_tokens``.
    cache : ``kv_cache_bytes`` (live), ``kv_cache_full_bytes`` and ``kv_cache_end_bytes`` (live, after the last token);
        and ``simulated``, where the step reads the whole cache whatever lives in it.
    facts : the job's ``model_config``, ``dtype``, ``weights_bytes``, ``device`` and ``variant``.
    rates : by device.
    """
    dtype = str(facts.get("dtype", "")).removeprefix("torch.")
    found = rates.get(facts.get("device", ""))
    if "model_config" not in facts or found is None or dtype not in found.matmul_flops_per_s:
        return None
    itemsize, batch = ITEMSIZE[dtype], cell["batch_size"]
    try:
        model = Architecture.of(facts["model_config"])
        if facts["weights_bytes"] != model.parameters * itemsize:
            return None  # quantized, or not the architecture that its config names
        trained = "dms" in facts["variant"]["spec"]
        prompt = None if trained else prefill(model, batch, cell["prompt_tokens"], itemsize)
        return Limits(prompt, _decode(model, cell, cache, facts, itemsize), found, dtype)
    except Unsupported:
        return None


def _decode(model: Architecture, cell: Mapping[str, Any], cache: Row, facts: Row, itemsize: int) -> Work | None:
    live, end = cache.get("kv_cache_bytes"), cache.get("kv_cache_end_bytes")
    if live is None or end is None:
        return None
    token = cell["batch_size"] * model.kv_elements * itemsize
    growth = min(1.0, (end - live) / token / (cell["new_tokens"] - 1))
    # DMS evicts at most one token a step and head, so its cache grows evenly; a decoding press cuts it at intervals
    if growth < 1 and "dms" not in facts["variant"]["spec"]:
        return None
    read = max(live, cache["kv_cache_full_bytes"]) if cache["simulated"] else live
    return mean_decode_step(model, cell["batch_size"], read / token, cell["new_tokens"], itemsize, growth)
