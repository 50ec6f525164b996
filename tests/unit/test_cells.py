"""A cell that a smaller one of its variant has shown not to fit is left out, and says why."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kvbench import cells, files, tables
from kvbench.jobs import Job

FACTS = {
    "variant": {"model": "m", "method": "k", "spec": {}},
    "loading": {"dtype": "auto", "attention": "sdpa"},
    "protocol": {"name": "standard"},
    "device": "NVIDIA H100",
    "code": "abc",
}
SMALL = {"batch_size": 8, "prompt_tokens": 1024, "new_tokens": 100}
LARGE = SMALL | {"batch_size": 16}


def tried(folder: Path, suffix: str, status: str, reason: str | None, sizes: dict[str, int], **facts: Any) -> None:
    known = FACTS | {"workload": sizes} | facts
    path = folder / f"small{suffix}"
    if suffix == ".json":
        files.write_json(path, {"status": status, "status_reason": reason, "provenance": known})
    else:
        row = {"repeat": 0, "status": status, "status_reason": reason}
        tables.write(path, pa.Table.from_pylist([row], cells.GENERATION), known)


def left_out(folder: Path, suffix: str, sizes: dict[str, int] = LARGE) -> str | None:
    job = Job(Path("m"), {}, {}, {}, {}, folder / f"large{suffix}")
    try:
        cells._must_be_tried(job, dict(FACTS), sizes)
    except MemoryError as error:
        return str(error)
    return None


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_larger_cell_is_not_tried(tmp_path: Path, suffix: str) -> None:
    place = tmp_path / "cells"
    place.mkdir()
    assert left_out(place, suffix) is None
    tried(place, suffix, "oom", "CUDA out of memory", SMALL)
    assert left_out(place, suffix) == "not tried: small, which is no larger, ran out of memory on this device"


@pytest.mark.parametrize(
    ("status", "reason", "sizes", "facts"),
    [
        ("ok", None, SMALL, {}),
        ("failed", "ValueError", SMALL, {}),
        ("oom", "not tried: tiny, which is no larger, ran out of memory", SMALL, {}),
        ("oom", "CUDA out of memory", LARGE | {"new_tokens": 200}, {}),
        ("oom", "CUDA out of memory", SMALL, {"device": "another"}),
        ("oom", "CUDA out of memory", SMALL, {"code": "before an edit"}),
        ("oom", "CUDA out of memory", SMALL, {"loading": {"dtype": "float32"}}),
    ],
)
def test_what_says_nothing_of_this_cell(
    tmp_path: Path, status: str, reason: str | None, sizes: dict[str, int], facts: dict[str, Any]
) -> None:
    place = tmp_path / "cells"
    place.mkdir()
    tried(place, ".parquet", status, reason, sizes, **facts)
    assert left_out(place, ".parquet") is None


def test_a_cell_says_which_attention_kernels_it_runs() -> None:
    import torch

    from kvbench import engines, methods
    from kvbench.dms.method import Dms

    hf, packed = (engines.engine(name, torch.device("cpu")) for name in ("hf", "graph"))
    assert cells._kernels("sdpa", methods.Dense(), hf) == "sdpa"
    assert cells._kernels("sdpa", methods.Dense(), packed) == "sdpa, decode kvbench_packed"
    assert cells._kernels("sdpa", Dms(Path("adapter")), packed) == "kvbench_dms"
