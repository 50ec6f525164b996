"""The article's bytes and peaks from random weights of Qwen3-8B's shapes; needs a GPU with 48 GiB or more."""

from typing import Any

import pytest
import torch

from kvbench import energy, engines, measure, methods, nvml, sources
from kvbench.loading import load_model

GIB = 2**30
NEEDED = 48 * GIB
KNORM = {"press": "KnormPress", "args": {"compression_ratio": 0.8}}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < NEEDED,
        reason="needs a CUDA device with 48 GiB",
    ),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, measure.Batch]:
    """The model, and a batch of 64 × 1024 tokens padded as the article pads."""
    folder = tmp_path_factory.mktemp("qwen")
    manifest = sources.fetch_model("qwen", {"random": "Qwen/Qwen3-8B", "seed": 0}, folder / "manifest.json")
    model = load_model(manifest, "auto", "sdpa", torch.device("cuda:0")).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 150_000, (64, 1024), generator=generator).cuda()
    mask = torch.ones_like(ids)
    for row in range(1, 64):
        mask[row, : 8 * row] = 0
    return model, measure.Batch(ids, mask, 100, 0)


@pytest.mark.parametrize(
    ("spec", "cache_gib", "peak_gib"),
    [({}, 9.0, 30.89), (KNORM, 1.79296875, 23.69)],
    ids=["none", "knorm-0.8"],
)
def test_the_articles_bytes_and_peaks(setting: Any, spec: dict[str, Any], cache_gib: float, peak_gib: float) -> None:
    model, batch = setting
    effort = measure.Effort(repeats=1, max_repeats=1, share=0.01, max_warmup_runs=1)
    prefill = measure.prefill_article(model, batch, methods.build(spec), effort)["repeats"][0]
    assert prefill["kv_cache_bytes"] == cache_gib * GIB
    assert prefill["kv_cache_allocated_bytes"] == cache_gib * GIB
    (generation,) = measure.generation_article(model, batch, methods.build(spec), effort)["repeats"]
    assert generation["peak_generation_bytes"] == pytest.approx(peak_gib * GIB, rel=0.01)


def test_event_times_are_ordered_and_within_the_hosts(setting: Any) -> None:
    import time

    model, batch = setting
    start = time.perf_counter()
    engine = engines.engine("hf", torch.device("cuda:0"))
    effort, watch = measure.Effort(2, 2, 0.01, 1), nvml.Watch(nvml.connect(torch.device("cuda:0")))
    rows = measure.generation_standard(model, batch, methods.Dense(), effort, engine, watch)["repeats"]
    elapsed = time.perf_counter() - start
    assert 0 < sum(row["total_s"] for row in rows) < elapsed
    for row in rows:
        assert row["sm_clock_mhz"] > 0 and row["power_w"] > 0 and row["throttled"] is not None
        assert row["token_times_s"] == sorted(row["token_times_s"]) and len(row["token_times_s"]) == 100


@pytest.mark.parametrize("name", ["graph", "hf"])
def test_energy_is_that_of_a_busy_gpu(setting: Any, name: str) -> None:
    model, batch = setting
    batch = measure.Batch(batch.input_ids[:8], None, 100, 0)
    engine, gpu = engines.engine(name, torch.device("cuda:0")), nvml.connect(torch.device("cuda:0"))
    assert gpu is not None
    effort = measure.Effort(2, 2, 0.5, 1)
    (run, _) = measure.generation_standard(model, batch, methods.Dense(), effort, engine, nvml.Watch(gpu))["repeats"]
    joules = energy.per_token(model, batch, methods.Dense(), engine, gpu)
    assert joules is not None and len(joules) == energy.WINDOWS
    watts = [each * run["decode_tokens_per_s"] for each in joules]
    assert all(100 < each < 800 for each in watts), watts
