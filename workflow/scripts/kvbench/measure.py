"""Time and memory of prefill and generation; every repeat is kept, every quantity has its unit in its name."""

import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from kvbench import device as devices
from kvbench.cache import cache_bytes, full_cache_bytes
from kvbench.decode import must_be_given
from kvbench.engines import Engine
from kvbench.intervals import noise
from kvbench.kept import kept
from kvbench.methods import Dense
from kvbench.nvml import Watch

SETTLED = 0.02
"""Two warm-up runs that differ by less than this share end the warm-up."""

PREFILLS = 3
"""Prefills after the warm-up whose peaks are told, at most."""


_MEMORY = ("peak_generation_bytes", "peak_decode_bytes", "reserved_bytes")


@dataclass(frozen=True)
class Batch:
    """Token ids of a workload on the device.

    Attributes
    ----------
    input_ids : int64 [batch, prompt tokens].
    attention_mask : int64 [batch, prompt tokens], 0 at pads; None where all rows have the same length.
    new_tokens : how many tokens are generated for each row, whatever the model says.
    pad_token_id : what fills the pads.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    new_tokens: int
    pad_token_id: int


@dataclass(frozen=True)
class Effort:
    """How often.

    Attributes
    ----------
    repeats : measured runs at least, not counting those that the device was throttled in.
    max_repeats : measured runs at most, counting those.
    share : runs go on until the 95% interval of the median reaches no further from it than this share of it.
    max_warmup_runs : unmeasured runs before them, at most.
    """

    repeats: int
    max_repeats: int
    share: float
    max_warmup_runs: int


Record = dict[str, Any]


def prefill_standard(model: Any, batch: Batch, method: Dense, effort: Effort, engine: Engine, watch: Watch) -> Record:
    """Prefill with compression, warm: its peak memory, and the bytes of the cache it leaves.

    Peaks and bytes hardly vary, so a few repeats do. TTFT is that of whole generations.
    """
    memory = devices.memory_meter(batch.input_ids.device)

    def run() -> Record:
        clock = devices.clock(batch.input_ids.device)
        memory.reset()
        watch.begin()
        clock.mark()
        _, cache = engine.prefill(model, batch.input_ids, method)
        clock.mark()
        return {
            "ttft_s": clock.times(watch.look)[1],
            "peak_prefill_bytes": memory.peak(),
            "reserved_prefill_bytes": memory.reserved(),
            **watch.end(),
            **_cache_record(model, batch, method, cache),
        }

    warmup, _ = _warm_up(run, "ttft_s", effort.max_warmup_runs)
    records = [run() for _ in _progress(min(effort.repeats, PREFILLS), "prefill")]
    return {"repeats": records, "warmup_runs": warmup}


def generation_standard(
    model: Any, batch: Batch, method: Dense, effort: Effort, engine: Engine, watch: Watch
) -> Record:
    """Whole generations, warm: one record a repeat, with the time of every token.

    Times run from before the prefill. With N new tokens t_1 … t_N: TTFT is t_1, a decode step is one of N−1, its time
    is the inter-token latency (ITL), and decode throughput is batch × (N−1) / (t_N − t_1). The first step has what an
    engine does once, the copy of the cache into its static form: TPOT bears it, the ITL's percentiles leave it out.
    """
    rows, prompt_tokens = batch.input_ids.shape
    memory = devices.memory_meter(batch.input_ids.device)

    def run() -> Record:
        clock = devices.clock(batch.input_ids.device)
        peak_prefill: list[int | None] = []

        def prefilled(_: Any) -> None:
            peak_prefill.append(memory.peak())
            memory.reset()

        memory.reset()
        watch.begin()
        decoded = engine.generate(model, batch.input_ids, method, batch.new_tokens, clock.mark, prefilled)
        times = clock.times(watch.look)[1:]
        peak_decode, decode_s = memory.peak(), times[-1] - times[0]
        latencies = sorted(later - earlier for earlier, later in pairwise(times[1:] if len(times) > 2 else times))
        return {
            "ttft_s": times[0],
            "tpot_s": decode_s / (batch.new_tokens - 1),
            "itl_p50_s": _percentile(latencies, 50),
            "itl_p99_s": _percentile(latencies, 99),
            "decode_tokens_per_s": rows * (batch.new_tokens - 1) / decode_s,
            "prefill_tokens_per_s": rows * prompt_tokens / times[0],
            "article_tokens_per_s": rows * batch.new_tokens / decode_s,
            "total_s": times[-1],
            "token_times_s": times,
            "peak_generation_bytes": _largest(peak_prefill[0], peak_decode),
            "peak_decode_bytes": peak_decode,
            "reserved_bytes": memory.reserved(),
            "kv_cache_end_bytes": cache_bytes(decoded.cache).live,
            **_end_record(model, batch, method, decoded.cache),
            "tokens_sha256": hashlib.sha256(decoded.tokens.cpu().numpy().tobytes()).hexdigest(),
            **watch.end(),
        }

    warmup, first = _warm_up(run, "tpot_s", effort.max_warmup_runs)
    own = {key: first[key] for key in _MEMORY} if engine.keeps_buffers else {}
    measured = _until_settled(run, ("ttft_s", "tpot_s"), effort, "generation")
    measured["repeats"] = [record | own | {"warmup_runs": warmup} for record in measured["repeats"]]
    return measured | {"process_bytes": watch.gpu.process_bytes() if watch.gpu else None}


def prefill_article(model: Any, batch: Batch, method: Dense, effort: Effort) -> Record:
    """The article's prefill: no mask, all logits, host clock, after a forward pass over 10 tokens only.

    Source: the article's ``get_prefilling_stats``. Its first run is the article's; further repeats are warm.
    """
    memory = devices.memory_meter(batch.input_ids.device)
    with torch.no_grad():
        model(batch.input_ids[:, :10])
    _synchronize(batch.input_ids.device)

    method.must_fit(model, batch.input_ids.shape[1])

    def run() -> Record:
        from transformers import DynamicCache

        _clean(memory)
        with torch.no_grad(), method.everywhere(model):
            cache = DynamicCache()
            start = time.time()
            outputs = model(batch.input_ids, past_key_values=cache, use_cache=True)
            _synchronize(batch.input_ids.device)
            elapsed = time.time() - start
            if not method.own_code:
                must_be_given(outputs.past_key_values, cache)
            cached = _cache_record(model, batch, method, outputs.past_key_values)
        return {"ttft_s": elapsed, "peak_prefill_bytes": memory.peak(), **cached}

    return {"repeats": [run() for _ in _progress(effort.repeats, "prefill")], "warmup_runs": 0}


def generation_article(model: Any, batch: Batch, method: Dense, effort: Effort) -> Record:
    """The article's generation: transformers' ``generate`` with the padding mask, cold, timed as a whole.

    Source: the article's ``get_generation_stats``. Its first run is the article's; further repeats are warm.
    Throughput needs the prefill's time, so it is computed where both are merged.
    """
    memory = devices.memory_meter(batch.input_ids.device)
    settings = model.generation_config
    settings.pad_token_id, settings.eos_token_id, settings.do_sample = batch.pad_token_id, None, False
    method.must_fit(model, batch.input_ids.shape[1] + batch.new_tokens - 1)
    mask = batch.attention_mask
    if mask is None:  # left to itself, transformers infers a mask wherever a prompt holds the padding's id
        mask = torch.ones_like(batch.input_ids)

    def run() -> Record:
        _clean(memory)
        with torch.no_grad(), method.everywhere(model):
            start = time.time()
            tokens = model.generate(
                batch.input_ids, attention_mask=mask, max_new_tokens=batch.new_tokens, generation_config=settings
            )
            _synchronize(batch.input_ids.device)
            total = time.time() - start
        new = tokens[:, batch.input_ids.shape[1] :]
        return {
            "total_s": total,
            "peak_generation_bytes": memory.peak(),
            "reserved_bytes": memory.reserved(),
            "tokens_sha256": hashlib.sha256(new.cpu().numpy().tobytes()).hexdigest(),
            "warmup_runs": 0,
        }

    return {"repeats": [run() for _ in _progress(effort.repeats, "generation")]}


def _cache_record(model: Any, batch: Batch, method: Dense, cache: Any) -> Record:
    """What a prompt's cache takes, what of it can be read, and what the method says of it."""
    measured = cache_bytes(cache)
    rows, tokens = batch.input_ids.shape
    state = kept(model, cache, rows, tokens)
    return {
        "kv_cache_bytes": measured.live,
        "kv_cache_allocated_bytes": measured.allocated,
        "kv_cache_full_bytes": full_cache_bytes(model.config, rows, tokens, model.dtype.itemsize),
        "kept_fraction": state.fraction,
        "simulated": state.simulated,
        "facts": method.facts(cache),
    }


def _end_record(model: Any, batch: Batch, method: Dense, cache: Any) -> Record:
    """What can be read after the last step, where a method acts on what is decoded; the last token is not read."""
    if not method.acts_while_decoding:
        return {}
    rows, tokens = batch.input_ids.shape
    state = kept(model, cache, rows, tokens + batch.new_tokens - 1)
    return {"kept_fraction_end": state.fraction, "simulated": state.simulated}


def _warm_up(run: Callable[[], Record], key: str, at_most: int) -> tuple[int, Record]:
    """Run until two runs in a row agree, or ``at_most`` times; returns how often, and the first run's record."""
    first = last = run()
    for count in range(2, at_most + 1):
        record = run()
        if abs(record[key] - last[key]) <= SETTLED * last[key]:
            return count, first
        last = record
    return at_most, first


def _until_settled(run: Callable[[], Record], keys: tuple[str, ...], effort: Effort, what: str) -> Record:
    """Repeat a run until the medians of ``keys`` are known well enough, or as often as allowed.

    Returns
    -------
    The records, and whether the asked precision was reached.
    """
    records: list[Record] = []
    settled = False
    with tqdm(total=effort.repeats, desc=what, unit="run", mininterval=1.0) as bar:
        while len(records) < effort.max_repeats and not settled:
            records.append(run())
            bar.total = max(bar.total, len(records))
            bar.update()
            steady = [record for record in records if not record["throttled"]]
            settled = len(steady) >= effort.repeats and all(
                (noise([record[key] for record in steady]) or 0.0) <= effort.share for key in keys
            )
    return {"repeats": records, "settled": settled}


def _percentile(ordered: list[float], percent: int) -> float:
    """The nearest-rank percentile of values in ascending order."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _progress(repeats: int, what: str) -> Iterator[int]:
    yield from tqdm(range(repeats), desc=what, unit="run", mininterval=1.0)


def _largest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _clean(memory: devices.MemoryMeter) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    memory.reset()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
