"""Numbers and differences in words: one table of quantities for the figures and the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvbench import intervals

Row = Mapping[str, Any]
Verdict = Literal["more", "less", "equal", "indistinguishable", "unknown", "elsewhere"]

STATUS_WORDS = {"oom": "out of memory", "unsupported": "unsupported", "failed": "failed"}

UNITS: dict[str, list[tuple[float, str]]] = {
    "bytes": [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")],
    "seconds": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")],
    "rate": [(1, "tok/s")],
    "share": [(0.01, "%")],
    "factor": [(1, "×")],
    "count": [(1, "")],
    "tokens": [(1, "tokens")],
    "joules": [(1, "J/token"), (1e-3, "mJ/token")],
}


@dataclass(frozen=True)
class Quantity:
    """A measured column: its name for a reader, its unit's family and which direction is better.

    ``counted`` marks what is counted rather than timed: it needs no interval to be compared.
    """

    column: str
    title: str
    kind: str
    better: Literal["lower", "higher", None] = None
    counted: bool = False
    cpu_title: str | None = None

    def name(self, device: str) -> str:
        """The title on this device: a CPU run has a resident set, no VRAM."""
        return self.cpu_title if self.cpu_title and is_cpu(device) else self.title


QUANTITIES = {
    quantity.column: quantity
    for quantity in (
        Quantity("decode_tokens_per_s", "Decode throughput", "rate", "higher"),
        Quantity("ttft_s", "TTFT", "seconds", "lower"),
        Quantity("fastest_ttft_s", "Fastest possible TTFT", "seconds", counted=True),
        Quantity("kv_cache_bytes", "KV cache", "bytes", "lower", counted=True),
        Quantity("kv_cache_allocated_bytes", "Cache allocated", "bytes", "lower", counted=True),
        Quantity("kv_cache_full_bytes", "Cache uncompressed", "bytes", counted=True),
        Quantity("kv_compression_factor", "Compression", "factor", counted=True),
        Quantity("kept_fraction", "Cache that can be read", "share", counted=True),
        Quantity("kept_fraction_end", "The same at the last token", "share", counted=True),
        Quantity("window", "Window", "tokens", counted=True),
        Quantity("block_size", "Block", "tokens", counted=True),
        Quantity("peak_generation_bytes", "Peak VRAM", "bytes", "lower", cpu_title="Peak memory (resident set)"),
        Quantity("tpot_s", "TPOT", "seconds", "lower"),
        Quantity("fastest_tpot_s", "Fastest possible TPOT", "seconds", counted=True),
        Quantity("prefill_tokens_per_s", "Prefill throughput", "rate", "higher"),
        Quantity(
            "peak_prefill_bytes",
            "Peak VRAM, prefill",
            "bytes",
            "lower",
            cpu_title="Peak memory, prefill (resident set)",
        ),
        Quantity("mbu", "MBU", "share"),
        Quantity("mfu", "MFU", "share"),
        Quantity("energy_j_per_token", "Energy", "joules", "lower"),
        Quantity("itl_p99_s", "ITL, 99th percentile", "seconds", "lower"),
        Quantity("largest_batch", "Largest batch that fits", "count", "higher"),
        Quantity("longest_prompt_tokens", "Longest prompt that fits", "count", "higher"),
        Quantity("article_tokens_per_s", "Throughput, article’s way", "rate", "higher"),
        Quantity("article_warm_tokens_per_s", "The same, warm", "rate", "higher"),
    )
}


def is_cpu(device: str | None) -> bool:
    """Whether a ``device`` of the stats names a CPU."""
    return (device or "").startswith("cpu")


def throughput_column(row: Row) -> str:
    """The throughput a protocol reports: the article's protocol has its own formula."""
    return "article_tokens_per_s" if row.get("protocol") == "article" else "decode_tokens_per_s"


def scale(kind: str, values: Iterable[float | None]) -> tuple[float, str]:
    """Divisor and unit in which the largest of ``values`` reads best."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    for divisor, unit in UNITS[kind]:
        if largest >= divisor:
            return float(divisor), unit
    divisor, unit = UNITS[kind][-1] if largest else UNITS[kind][0]
    return float(divisor), unit


def number(value: float, significant: int = 3, largest: float | None = None) -> str:
    """At least ``significant`` digits, thousands grouped, the whole part never rounded: 1,271 and 3.49.

    With ``largest``, the value gets the decimals of the largest it stands beside, and two digits at least.
    """
    decimals = _decimals(value, significant)
    if largest is not None:
        decimals = max(_decimals(largest, significant), min(decimals, _decimals(value, 2)))
    return f"{value:,.{decimals}f}"


def _decimals(value: float, significant: int) -> int:
    if value == 0:
        return 0
    size = float(f"{abs(value):.{significant - 1}e}")  # rounded first: 9.996 is 10.0, not 10.00
    return max(0, significant - 1 - math.floor(math.log10(size)))


def digits(kind: str) -> int:
    """Significant digits worth showing, of a number that has more: bytes are counted, times are not that sharp."""
    return {"bytes": 4, "count": 1, "tokens": 1}.get(kind, 3)


def quantity(column: str, value: float | None, device: str = "") -> str:
    """A value with its unit, for running text."""
    if value is None:
        return "not measured"
    kind = QUANTITIES[column].kind
    divisor, unit = scale(kind, [value])
    space = "" if unit in ("%", "×", "") else " "
    return f"{number(value / divisor, digits(kind))}{space}{unit}"


def percent(value: float, base: float) -> float | None:
    """Change of ``value`` against ``base`` in percent, positive for more; None without a base."""
    return None if not base else 100 * (value - base) / base


def change_words(value: float, base: float) -> str:
    """``63% more``, ``80% less`` or ``no change``; never a sign and a word at once."""
    change = percent(value, base)
    if change is None:
        return ""
    size = abs(change)
    if size < 0.05:
        return "no change" if value == base else f"<0.1% {'more' if change > 0 else 'less'}"
    text = f"{size:.1f}" if round(size, 1) < 1 else f"{size:,.0f}"
    return f"{text}% {'more' if change > 0 else 'less'}"


@dataclass(frozen=True)
class Comparison:
    """A row against its baseline in one column.

    ``verdict`` is `more` or `less` only when the two intervals do not touch, `equal` for the same counted
    value, `indistinguishable` when they overlap, `unknown` when there are no intervals or so few repeats
    that chance alone parts them more than once in twenty times, `elsewhere` when what was timed was timed on another
    device or under another protocol.
    """

    percent: float | None
    words: str
    verdict: Verdict

    @property
    def clear(self) -> bool:
        """Whether the data support the direction."""
        return self.verdict in ("more", "less", "equal")

    def good(self, better: str | None) -> bool | None:
        """Whether a clear change is for the better; None when there is none to judge."""
        if better is None or self.verdict not in ("more", "less"):
            return None
        return (self.verdict == "more") == (better == "higher")


def compare(row: Row, base: Row | None, column: str) -> Comparison | None:
    """How ``row`` differs from ``base`` in ``column``; None when either has no value there."""
    if base is None or row.get(column) is None or not base.get(column):
        return None
    value, reference = float(row[column]), float(base[column])
    return Comparison(percent(value, reference), change_words(value, reference), _verdict(row, base, column))


def _verdict(row: Row, base: Row, column: str) -> Verdict:
    value, reference = row[column], base[column]
    if not QUANTITIES[column].counted and any(row.get(key) != base.get(key) for key in ("device", "protocol")):
        return "elsewhere"
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    base_low, base_high = base.get(f"{column}_low"), base.get(f"{column}_high")
    if _counted(QUANTITIES[column], row):
        low, high = (value if low is None else low), (value if high is None else high)
        base_low = reference if base_low is None else base_low
        base_high = reference if base_high is None else base_high
        if value == reference:
            return "equal"
    elif intervals.by_chance(row.get("repeats") or 0, base.get("repeats") or 0) > 0.05:
        return "unknown"
    if low is None or high is None or base_low is None or base_high is None:
        return "unknown"
    if low <= base_high and base_low <= high:
        return "indistinguishable"
    return "more" if value > reference else "less"


def _counted(measured: Quantity, row: Row) -> bool:
    """What fits, and a GPU's bytes by its allocator, are a device's but exact; a resident set moves with the system."""
    return measured.counted or measured.kind == "count" or (measured.kind == "bytes" and not is_cpu(row.get("device")))


def interval_words(repeats: int) -> str:
    """What an interval of this many repeats is: below six, the range, which cannot reach 95%."""
    if repeats < 2:
        return "no interval"
    if repeats < 6:
        return f"range of the repeats, a {100 * (1 - 2.0 ** (1 - repeats)):.0f}% interval of the median"
    return "95% interval of the median"


def shorten(text: object, width: int) -> str:
    """One line of at most ``width`` characters, cut at the end with an ellipsis."""
    line = " ".join(str(text or "").split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def listing(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def counts(found: Sequence[str], names: Mapping[str, str]) -> str:
    """``3 faster and 1 slower``: how often each of ``names`` was found, in their order, by its words."""
    return listing([f"{found.count(key)} {name}" for key, name in names.items() if key in found])


def workload_words(row: Row) -> str:
    """``batch 64 × 1,024 prompt + 100 new tokens``."""
    return f"batch {row['batch_size']:,} × {row['prompt_tokens']:,} prompt + {row['new_tokens']:,} new tokens"


def missing_words(row: Row, width: int) -> str:
    """Why a cell has no numbers, short: its status and the start of its reason."""
    status = STATUS_WORDS.get(str(row["status"]), str(row["status"]))
    reason = shorten(row.get("status_reason"), width - len(status) - 2)
    return f"{status}: {reason}" if reason else status
