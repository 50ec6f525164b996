"""Fused forms compute what the model's own modules do, on the same weights, and leave the model as it was."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import dms_reference
import kvbench
import step_reference
import tiny
from kvbench import engines, methods
from kvbench.decode import generate
from kvbench.dms import evict
from kvbench.fused import Fused


def storages(model: torch.nn.Module) -> int:
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(sizes.values())


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_the_fused_model_is_the_model(architecture: str) -> None:
    model, ids = tiny.model(architecture), tiny.ids(2, 30)
    before, bytes_, names = model(ids).logits, storages(model), [name for name, _ in model.named_modules()]
    weights = copy.deepcopy(model.state_dict())
    fused = Fused(model)
    assert fused.norms and len(fused.groups) == 2 * model.config.num_hidden_layers
    with fused.norms_applied(), fused.projections_applied():
        torch.testing.assert_close(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert storages(model) == bytes_, "weights are held twice"


def test_a_model_that_is_not_known_is_left_alone() -> None:
    fused = Fused(tiny.model("Phi3"))
    assert not fused.norms and not fused.groups and not fused.steps


def test_a_failure_inside_restores_the_model() -> None:
    model, ids = tiny.model(), tiny.ids(1, 10)
    fused = Fused(model)
    with pytest.raises(RuntimeError), fused.norms_applied(), fused.projections_applied(), fused.kernels_applied():
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())
    model(ids)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The step's kernels by their plain forms, which let an engine apply them on a CPU too."""
    plain = Mock(wraps=step_reference)
    monkeypatch.setattr(kvbench, "step_kernels", plain, raising=False)
    monkeypatch.setattr(Fused, "projections_applied", Fused.kernels_applied)
    return plain


def nothing(_: Any = None) -> None:
    return None


@pytest.mark.parametrize("press", [None, "KnormPress"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_step_with_kernels_is_the_models(architecture: str, press: str | None, kernels: Mock) -> None:
    model, engine = tiny.model(architecture), engines.engine("graph", torch.device("cpu"))
    method = methods.build({"press": press, "args": {"compression_ratio": 0.5}} if press else {})
    for seed in (0, 1):
        ids = tiny.ids(2, 70, seed)
        expected = generate(model, ids, method, 8).tokens.tolist()
        assert engine.generate(model, ids, method, 8, nothing, nothing).tokens.tolist() == expected
    layers = model.config.num_hidden_layers
    assert kernels.rotate.call_count == kernels.gate.call_count == 14 * layers
    assert kernels.add_norm.call_count == 14 * (2 * layers - 1)
    assert all(call.args[-1] is not None for call in kernels.rotate.call_args_list), "stored apart"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_a_step_with_kernels_leaves_storing_to_dms(architecture: str, kernels: Mock, tmp_path: Path) -> None:
    evict.save(dms_reference.heads(0.3, 12), tmp_path)
    model, dms = copy.deepcopy(tiny.model(architecture)), methods.build({"dms": {"adapter": str(tmp_path)}})
    ids, engine = tiny.ids(2, 70), engines.engine("graph", torch.device("cpu"))
    expected = generate(model, ids, dms, 20).tokens.tolist()
    assert engine.generate(model, ids, dms, 20, nothing, nothing).tokens.tolist() == expected
    assert all(call.args[-1] is None for call in kernels.rotate.call_args_list)
    assert kernels.rotate.call_count == 19 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("setting", "name"), [({"head_dim": 24}, "self_attn"), ({"hidden_act": "gelu"}, "mlp")], ids=str
)
def test_what_the_kernels_do_not_fit_is_left_alone(setting: dict[str, Any], name: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**tiny.SIZES, **setting))
    with Fused(model).kernels_applied():
        changed = [path for path, module in model.named_modules() if "forward" in vars(module)]
    assert len(changed) == 2 * model.config.num_hidden_layers
    assert not any(path.endswith(name) for path in changed)


def test_a_step_that_failed_leaves_nothing_to_the_next(kernels: Mock) -> None:
    model = tiny.model()
    fused = Fused(model)
    with pytest.raises(RuntimeError), fused.kernels_applied():
        fused.layers[0].normed = torch.zeros(1)
        raise RuntimeError
    assert all(layer.normed is None for layer in fused.layers)
