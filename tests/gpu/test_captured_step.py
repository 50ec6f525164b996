"""On a GPU the captured step gives the tokens of the eager one, in float32 to the letter."""

from typing import Any

import pytest
import torch

import tiny
from kvbench import engines, methods
from kvbench.decode import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRESSES = [None, "KnormPress", "SnapKVPress", "ExpectedAttentionPress", "StreamingLLMPress", "PyramidKVPress"]


def nothing(_: Any = None) -> None:
    return None


# compilation takes long, and differs by shape rather than by press
CASES = [("graph", press) for press in PRESSES] + [("compile", press) for press in (None, "KnormPress")]


@pytest.mark.parametrize(("name", "press"), CASES)
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_the_captured_step_equals_the_eager_one(architecture: str, press: str | None, name: str) -> None:
    model = tiny.model(architecture).cuda()
    method = methods.build({"press": press, "args": {"compression_ratio": 0.5}} if press else {})
    engine = engines.engine(name, torch.device("cuda"))
    for seed in (0, 1):  # the second run replays the first one's graph
        ids = tiny.ids(3, 90, seed).cuda()
        expected = generate(model, ids, method, 12).tokens.tolist()
        assert engine.generate(model, ids, method, 12, nothing, nothing).tokens.tolist() == expected
    model.cpu()


@pytest.mark.parametrize("name", ["graph", "compile"])
def test_in_bfloat16_the_logits_are_those_of_the_eager_step(name: str) -> None:
    """Teacher-forced, so that a near tie does not part the two; bfloat16 has three digits."""
    model = tiny.model("Qwen3").cuda().to(torch.bfloat16)
    ids, method = tiny.ids(3, 90).cuda(), methods.Dense()
    engine = engines.engine(name, torch.device("cuda"))
    tokens = engine.generate(model, ids, method, 12, nothing, nothing).tokens
    with torch.no_grad():
        whole = model(torch.cat([ids, tokens[:, :-1]], dim=1)).logits[:, 89:].float()
    best, chosen = whole.max(-1).values, whole.gather(-1, tokens[..., None])[..., 0]
    assert ((best - chosen) <= 0.02 * best.abs()).all(), "a token that the eager step would not choose"
