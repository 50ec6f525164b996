"""Quality on a GPU: the same rows as on the CPU, and a noise floor far below what compression does."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from kvbench import distribution, methods
from kvbench.window_table import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALF = {"compression_ratio": 0.5}
SNAP = {"press": "SnapKVPress", "args": HALF}
SPECS = [
    SNAP,
    {"press": "KnormPress", "args": HALF},
    {"press": "PyramidKVPress", "args": HALF},
    {"press": "AdaKVPress", "args": {"press": SNAP}},
    {"press": "ThinKPress", "args": {"key_channel_compression_ratio": 0.5}},
    {
        "press": "DecodingPress",
        "args": {
            "base_press": {"press": "KnormPress", "args": {}},
            "compression_interval": 3,
            "target_size": 90,
        },
    },
]


def windows() -> list[Window]:
    return [Window("book", str(i), i, row[:140], row[140:]) for i, row in enumerate(tiny.ids(5, 157).tolist())]


def on_gpu(dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(tiny.model()).to("cuda", dtype)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["press"])
def test_it_gives_what_the_cpu_gives(spec: dict[str, Any]) -> None:
    here = list(distribution.against_full(tiny.model(), methods.build(spec), windows()))
    there = list(distribution.against_full(on_gpu(), methods.build(spec), windows()))
    for a, b in zip(here, there, strict=True):
        assert (a["kept_fraction"], a["simulated"]) == (b["kept_fraction"], b["simulated"])
        for column in ("kl", "nll", "nll_full"):
            assert b[column] == pytest.approx(a[column], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_noise_floor_is_ten_times_below_a_press(dtype: torch.dtype) -> None:
    model, other = on_gpu(dtype), on_gpu(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    noise = list(distribution.noise(model, other, windows()))
    press = np.mean([part["kl"] for part in distribution.against_full(model, methods.build(SNAP), windows())])
    for reference in ("batch", "dtype"):
        assert np.mean([part["kl"] for part in noise if part["reference"] == reference]) < press / 10
