"""The DMS checkpoint's stand-in on a GPU, and flash-attn's own stand-in against flash-attn where it is installed."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dms_checkpoint as standin
import tiny
from kvbench import decode, engines, loading, methods
from kvbench.cache import cache_bytes, full_cache_bytes
from kvbench.errors import Unsupported

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def nothing(_: Any = None) -> None:
    return None


def test_it_decodes_by_its_own_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(standin.PACKAGES)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    method, device = methods.build(standin.SPEC), torch.device("cuda:0")
    manifest = standin.manifest(standin.save(tmp_path / "tiny-dms-gpu"))
    with method.loading(manifest):
        model = loading.load_model(manifest, "float32", "sdpa", device).model
    method.check(model, 2)
    whole = ids = tiny.ids(2, 400).to(device)
    with pytest.raises(Unsupported, match="use engine: hf"):
        engines.engine("auto", device).generate(model, ids, method, 4, nothing, nothing)
    found = engines.engine("hf", device).generate(model, ids, method, 12, nothing, nothing)
    with torch.no_grad():
        for _ in range(12):
            whole = torch.cat([whole, model(whole).logits[:, -1:].argmax(-1)], 1)
    assert found.tokens.tolist() == whole[:, 400:].tolist()
    _, cache = decode.prefill(model, ids, method)
    measured = cache_bytes(cache)
    assert measured.live < full_cache_bytes(model.config, 2, 400, 4) < measured.allocated


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn")
def test_the_stand_in_of_flash_attention_is_true_to_it() -> None:
    from flash_attn import flash_attn_with_kvcache as real

    file = standin.PACKAGES / "flash_attn" / "__init__.py"
    spec = importlib.util.spec_from_file_location("flash_attn_standin", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    keys, values = (torch.randn(9, 256, 1, 128, **options) for _ in range(2))
    query = torch.randn(4, 1, 4, 128, **options)
    table = torch.tensor([[3, 1], [0, -1], [8, 2], [5, 7]], dtype=torch.int32, device="cuda")
    about = {
        "cache_seqlens": torch.tensor([300, 7, 511, 256], dtype=torch.int32, device="cuda"),
        "softmax_scale": 128**-0.5,
        "causal": True,
        "block_table": table,
    }
    expected = real(query, keys, values, k=None, v=None, **about)
    torch.testing.assert_close(module.flash_attn_with_kvcache(query, keys, values, **about), expected)
