"""How far a workload's numbers can be trusted, in sentences: noise, stopping rule, clocks, heat, the time around."""

from collections.abc import Sequence
from statistics import median

from kvbench import words
from kvbench.findings import Finding
from kvbench.results import unique
from kvbench.words import Row


def of_workload(rows: Sequence[Row]) -> list[Finding]:
    """What is known of the conditions of one workload's cells; nothing is said of what was not watched."""
    cells = [row for row in rows if row["status"] == "ok"]
    found = [
        ("Noise", _noise(cells)),
        ("Device", _device(cells)),
        ("Throttling", _throttling(cells)),
        ("Memory around", _memory(cells)),
        ("Time of a job", _time(cells)),
    ]
    return [Finding(about, text) for about, text in found if text]


def _noise(cells: Sequence[Row]) -> str:
    """How wide the intervals are, and which cells stopped before theirs was narrow enough."""
    noises = [row["tpot_noise"] for row in cells if row.get("tpot_noise") is not None]
    share = next((row["interval_share"] for row in cells if row.get("interval_share") is not None), None)
    if not noises or share is None:
        return ""
    unsettled = [str(row["variant"]) for row in cells if row.get("settled") is False]
    text = f"the median TPOT is known to within {_span([100 * noise for noise in noises])}%; asked: {100 * share:g}%"
    return text + (f"; not reached before the cap on repeats: {words.listing(unsettled)}." if unsettled else ".")


def _device(cells: Sequence[Row]) -> str:
    clocks, heat, power = (
        [row[name] for row in cells if row.get(name) is not None]
        for name in ("sm_clock_mhz", "temperature_c", "power_w")
    )
    if not clocks:
        return ""
    return f"SM clock {_span(clocks)} MHz, {_span(heat)} °C, {_span(power)} W during the runs, prefill and decode."


def _throttling(cells: Sequence[Row]) -> str:
    """Runs that the device could not hold its speed in, and what else slowed it."""
    if all(row.get("sm_clock_mhz") is None for row in cells):
        return ""
    hit = [row for row in cells if row.get("throttled_repeats")]
    slowed = unique(reason for row in cells for reason in (row.get("slowed_by") or "").split(", ") if reason)
    if hit:
        left, all_ = ([row for row in hit if bool(row.get("throttled")) is state] for state in (False, True))
        runs = words.listing([f"{row['throttled_repeats']} of {row['variant']}" for row in left])
        told = [f"runs that heat or the hardware slowed were repeated and left out: {runs}"] if left else []
        names = words.listing([str(row["variant"]) for row in all_])
        told += [f"heat or the hardware slowed every run of {names}, and the figures are of such runs"] if all_ else []
        return f"{'; '.join(told)} ({words.listing(slowed)})."
    reached = f"; {words.listing(slowed)} was reached" if slowed else ""
    return f"no run was slowed by heat or by the hardware{reached}."


def _memory(cells: Sequence[Row]) -> str:
    """What stands beside the peak: weights, what the allocator held, what the process held."""
    parts = []
    for name, title in (
        ("weights_bytes", "weights"),
        ("reserved_bytes", "held by the allocator while decoding"),
        ("process_bytes", "held by the process"),
    ):
        values = [row[name] for row in cells if row.get(name) is not None]
        if values:
            divisor, unit = words.scale("bytes", values)
            parts.append(f"{title} {_span([value / divisor for value in values])} {unit}")
    return "; ".join(parts) + "." if parts else ""


def _time(cells: Sequence[Row]) -> str:
    """What a generation job costs around its measurement."""
    parts = []
    for name, title in (("import_s", "import"), ("load_s", "load"), ("work_s", "measurement")):
        values = [row[name] for row in cells if row.get(name) is not None]
        if values:
            parts.append(f"{title} {words.number(median(values), 2)} s")
    states = unique(row.get("load_state") for row in cells)
    tokenization = [row["tokenization_s"] for row in cells if row.get("tokenization_s") is not None]
    files = f" (weights' files {words.listing(states)})" if states else ""
    batch = f"; tokenizing the batch {1e3 * median(tokenization):.3g} ms, in no TTFT here" if tokenization else ""
    return f"{', '.join(parts)}{files}{batch}." if parts else ""


def _span(values: Sequence[float]) -> str:
    """The least and the most of values, or the one that both are."""
    ends = unique(words.number(value, 2) for value in (min(values), max(values)))
    return " to ".join(ends)
