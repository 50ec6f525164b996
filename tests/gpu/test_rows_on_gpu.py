"""On a GPU too, in float32, prompts of different lengths get together the tokens that each gets alone."""

import pytest
import torch

import tiny
from kvbench import methods, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRESSES = [
    "KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "TOVAPress", "KeyDiffPress",
    "LagKVPress", "PyramidKVPress", "RandomPress", "LeverageScorePress",
]  # fmt: skip


@pytest.mark.parametrize("press", PRESSES)
def test_prompts_of_different_lengths_equal_each_alone(press: str) -> None:
    model = tiny.model.__wrapped__().cuda()
    spec = {"press": press, "args": {"compression_ratio": 0.6}}
    lengths = [80, 131, 80, 100, 131, 80]
    prompts = [tiny.ids(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    alone = [rows.generate_rows(model, [prompt], methods.build(spec), 16)[0] for prompt in prompts]
    assert rows.generate_rows(model, prompts, methods.build(spec), 16) == alone
