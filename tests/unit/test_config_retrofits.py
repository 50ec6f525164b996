"""Retrofits in the config: what they fill in, which model their method runs on, and what is said of what is wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest

from kvbench import config, grid
from kvbench.errors import UserError

HUB = {"hub": "Qwen/Qwen3-8B", "revision": "b968826d9c46dd6066d109eabc6255188de91218"}
GIVEN: dict[str, Any] = {
    "results": "out",
    "models": {"m": {"source": HUB}, "other": {"source": HUB}},
    "methods": {"baseline": "none", "mine": {"dms": {"retrofit": "m-4x"}}},
    "retrofits": {"m-4x": {"model": "m"}},
}


def changed(**keys: Any) -> dict[str, Any]:
    return copy.deepcopy(GIVEN) | keys


def retrofit(**keys: Any) -> dict[str, Any]:
    return changed(retrofits={"m-4x": {"model": "m"} | keys})


def test_only_the_model_must_be_named() -> None:
    filled = config.load(GIVEN).retrofits["m-4x"]
    assert (filled.window, filled.cr, filled.lora_rank, filled.whole_model) == (64, 4.0, 16, False)
    assert filled.text == "conversations" and filled.learning_rate is None
    assert (filled.prose, filled.prose_from) == (0.25, ["addresses", "fiction"])


def test_its_method_runs_on_its_model_alone_and_names_the_adapters_folder() -> None:
    found = config.load(GIVEN)
    pairs = [(each.model, each.method) for each in grid.variants(found)]
    assert pairs == [("m", "baseline"), ("m", "mine"), ("other", "baseline")]
    assert grid.method_spec(found, "mine") == {"dms": {"adapter": "out/retrofit/m-4x/adapter"}}


def test_one_retrofit_serves_several_thresholds() -> None:
    methods = GIVEN["methods"] | {"more": {"dms": {"retrofit": "m-4x", "threshold": 2.5}}}
    found = config.load(changed(methods=methods))
    assert grid.method_spec(found, "mine") == {"dms": {"adapter": "out/retrofit/m-4x/adapter"}}
    assert grid.method_spec(found, "more") == {"dms": {"adapter": "out/retrofit/m-4x/adapter", "threshold": 2.5}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(methods={"x": {"dms": {"retrofit": "m-4"}}}), ["methods.x.dms.retrofit", "did you mean 'm-4x'"]),
        (
            changed(methods={"x": {"dms": {"retrofit": "m-4x", "adapter": "a"}}}),
            ["methods.x.dms", "exactly one of the keys checkpoint, adapter, retrofit"],
        ),
        (changed(variants=[{"model": "other", "method": "mine"}]), ["variants[0]", "a retrofit of m, and other"]),
        (retrofit(model="n"), ["retrofits.m-4x.model", "no model 'n'"]),
        (retrofit(prose_from=["novels"]), ["retrofits.m-4x.prose_from.0", "'novels'", "'addresses' or 'fiction'"]),
        (retrofit(prose_from=[]), ["retrofits.m-4x.prose_from"]),
        (retrofit(whole_model=True), ["retrofits.m-4x", "lora_rank: null"]),
        (retrofit(tokens=200), ["retrofits.m-4x", "a window of 64 tokens is more than 1/4 of 200"]),
        (retrofit(cr=1.0), ["retrofits.m-4x.cr", "greater than 1"]),
        (retrofit(stepz=3), ["retrofits.m-4x", "did you mean 'steps'"]),
        (retrofit(text="chats"), ["retrofits.m-4x.text", "'chats'"]),
        (retrofit(text={"path": "nowhere.txt"}), ["retrofits.m-4x.text.path", "'nowhere.txt'"]),
        (retrofit(text={"file": "x"}), ["retrofits.m-4x.text", "unknown key 'file'"]),
    ],
)
def test_what_is_wrong_is_named_by_key_and_value(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as found:
        config.load(data)
    assert all(word in str(found.value) for word in words), str(found.value)


def test_random_weights_and_short_contexts_are_refused(tmp_path: Path) -> None:
    random = changed(models={"m": {"source": {"random": "Qwen/Qwen3-8B"}}})
    with pytest.raises(UserError, match=r"retrofits\.m-4x\.model: m has random weights"):
        config.load(random)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 1100}', "utf-8")
    short = changed(models={"m": {"source": {"path": str(tmp_path)}}}, quality={"windows": 0})
    short["workloads"] = {"w": {"prompt_tokens": 8, "new_tokens": 2}}
    with pytest.raises(UserError, match=r"retrofits\.m-4x\.tokens: 2048, and 128 more .* than the 1100 of models\.m"):
        config.load(short)
