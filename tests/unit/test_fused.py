"""Fused forms compute what the model's own modules do, on the same weights, and leave the model as it was."""

import copy

import pytest
import torch

import tiny
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
    assert not fused.norms and not fused.groups


def test_a_failure_inside_restores_the_model() -> None:
    model, ids = tiny.model(), tiny.ids(1, 10)
    fused = Fused(model)
    with pytest.raises(RuntimeError), fused.norms_applied(), fused.projections_applied():
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())
    model(ids)
