"""Answers over compressed texts on a GPU: those of a batch are those of each prompt alone."""

from typing import Any

import pytest
import torch

import tiny
import tinyrun
from kvbench import book, methods, recall
from kvbench.haystack import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALF = {"compression_ratio": 0.5}
SPECS = [
    {},
    {"press": "KnormPress", "args": HALF},
    {"press": "RandomPress", "args": HALF | {"seed": 0}},
    {"press": "AdaKVPress", "args": {"press": {"press": "SnapKVPress", "args": HALF}}},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.get("press", "none"))
@pytest.mark.parametrize("query_aware", [False, True])
def test_a_batch_answers_as_each_prompt_alone(spec: dict[str, Any], query_aware: bool) -> None:
    tokenizer = tinyrun.tokenizer([book.chapters()[0].text], 310)
    model, method = tiny.model.__wrapped__().cuda(), methods.build(spec)
    prompts = [Prompt(row[:150], row[150:], 6) for row in tiny.ids(5, 170).tolist()]
    together = recall.answers(model, tokenizer, method, prompts, query_aware)
    assert together == [recall.answers(model, tokenizer, method, [one], query_aware)[0] for one in prompts]
