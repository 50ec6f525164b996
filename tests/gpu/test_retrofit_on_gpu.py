"""A retrofit on a GPU: kernels with the plain form's gradients, one compiled form for all layers, the same end."""

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from kvbench.dms import soft, student
from kvbench.dms.corpus import Corpus
from kvbench.dms.judge import judge
from kvbench.dms.student import Student
from kvbench.dms.train import Trainer
from kvbench.options import CONTINUATION, Retrofit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [  # rows, KV heads, group, tokens, head_dim, window
    (1, 1, 1, 1, 16, 3),
    (2, 2, 2, 70, 16, 5),
    (2, 3, 3, 1024, 64, 64),
    (1, 2, 4, 1000, 128, 200),
    (1, 1, 2, 129, 32, 1),
    (1, 2, 1, 90, 64, 500),
]
CLOSE = {torch.float32: {"atol": 2e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2}}
WINDOW, TOKENS = 6, 64


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("evicted", ["softly", "for good"])
def test_the_kernels_equal_the_plain_form_and_its_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, evicted: str
) -> None:
    rows, heads, group, tokens, dim, window = shape
    torch.manual_seed(0)

    def drawn(count: int, token_major: bool) -> torch.Tensor:
        shape = (rows, tokens, count, dim) if token_major else (rows, count, tokens, dim)
        made = torch.randn(shape, device="cuda", dtype=dtype)
        return (made.transpose(1, 2) if token_major else made).requires_grad_()

    query, keys, values = drawn(heads * group, True), drawn(heads, False), drawn(heads, True)
    logits = 4 * torch.randn(rows, heads, tokens, device="cuda")
    softly = torch.nn.functional.logsigmoid(-logits).clamp(min=soft.FLOOR)
    penalty = (softly if evicted == "softly" else torch.where(logits > 0, soft.EVICTED, 0.0)).requires_grad_()
    inputs, given = (query, keys, values, penalty), soft.Penalties(penalty, window)
    found, _ = soft.attend(None, query, keys, values, soft=given)
    up = torch.randn_like(found)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    plain = soft.attend_biased(*exact[:3], soft.Penalties(exact[3], window), dim**-0.5).transpose(1, 2)
    torch.testing.assert_close(found.double(), plain, **CLOSE[dtype])
    expected = torch.autograd.grad(plain, exact, up.double())
    for name, one, other in zip("qkvp", torch.autograd.grad(found, inputs, up), expected, strict=True):
        size = max(float(other.abs().max()), 1e-3)
        torch.testing.assert_close(one.double() / size, other / size, **CLOSE[dtype], msg=lambda m, n=name: f"{n}: {m}")


def settings(**changes: Any) -> Retrofit:
    given = {
        "model": "tiny", "window": WINDOW, "cr": 3.0, "lora_rank": 4, "steps": 60, "batch_size": 4, "tokens": TOKENS,
        "head_learning_rate": 3e-3, "evaluations": 3, "checkpoint_steps": 20,
    }  # fmt: skip
    return Retrofit(**given | changes)


def corpus() -> Corpus:
    draw = np.random.default_rng(0)

    def some(count: int, tokens: int) -> np.ndarray:
        return draw.integers(1, 300, (count, tokens)).astype(np.int32)

    return Corpus(some(100, TOKENS), np.arange(100), {"held": some(4, TOKENS + CONTINUATION)}, {})


def trainer(wanted: Retrofit, save: Any = lambda state: None) -> Trainer:
    model = copy.deepcopy(tiny.model("Qwen3")).cuda()
    made = Student(model, wanted.window, wanted.lora_rank, wanted.whole_model, wanted.seed)
    return Trainer(made, corpus(), wanted, lambda factor, rows: None, save, time.perf_counter())


def test_one_compiled_form_serves_all_layers() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    running = trainer(settings(steps=4))
    running.run()
    # the original's layer, the model's layer, the gates and the divergence
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "kind", [{}, {"lora_rank": None}, {"lora_rank": None, "whole_model": True}], ids=["lora", "heads", "whole"]
)
def test_what_is_asked_is_evicted(kind: dict[str, Any]) -> None:
    running = trainer(settings(**kind))
    running.run()
    last = [row for row in running.rows if row["corpus"] == "held"][-1]
    assert last["step"] == 60 and last["kept_fraction"] < 0.5 and 0 < last["kl"] < 1


def test_compiled_and_plain_steps_have_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for compiled in (True, False):
        running = trainer(settings())
        running.student.heads.bias.data.fill_(0.04)
        if not compiled:
            running.student._gates = student._gates
            for net in (running.student.net, running.student.original):
                net._fast = [layer.forward for layer in net.layers]
        monkeypatch.setattr(running.optimizer, "step", lambda: None)
        kl, share = running._train()
        grads = {name: value.grad for name, value in running.student.trained.items()}
        found.append((float(kl), float(share), grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.05) and found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    apart, whole = 0.0, 0.0
    for name, grad in found[0][2].items():
        other = found[1][2][name]
        difference, norm = float((grad - other).norm()), float(other.norm())
        assert difference <= 0.25 * norm + 1e-7, name  # bfloat16, and some of the matrices hardly matter
        apart, whole = apart + difference**2, whole + norm**2
    assert apart <= 0.1**2 * whole


def test_a_run_that_stopped_goes_on_to_the_same_end() -> None:
    states: list[dict[str, Any]] = []
    whole = trainer(settings(), lambda state: states.append(copy.deepcopy(state)))
    whole.run()
    again = trainer(settings())
    again.restore(states[0])
    again.run()
    for name, value in whole.student.trained.items():
        assert torch.equal(value, again.student.trained[name]), name


def test_judging_on_a_gpu_is_that_on_a_cpu() -> None:
    verdicts = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny.model()).to(device)
        made = Student(model, WINDOW, None, False, 0)
        made.heads.weight.data.copy_(torch.randn(made.heads.weight.shape, generator=torch.Generator().manual_seed(1)))
        ids = torch.from_numpy(corpus().held_out["held"]).long().to(device)
        verdicts.append(judge(made, ids, TOKENS, 3))
    assert verdicts[0].kept_fraction == pytest.approx(verdicts[1].kept_fraction, abs=0.01)
    assert verdicts[0].kl == pytest.approx(verdicts[1].kl, rel=0.2, abs=1e-4)
