"""The config: what it fills in, and what it says of everything that is wrong."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import config, grid
from kvbench.dms import layout
from kvbench.errors import UserError

COMMIT = "b968826d9c46dd6066d109eabc6255188de91218"
HUB = {"hub": "Qwen/Qwen3-8B", "revision": COMMIT}
SMALLEST: dict[str, Any] = {
    "models": {"m": {"source": HUB}},
    "methods": {"baseline": "none", "knorm-0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}}},
}


def changed(**keys: Any) -> dict[str, Any]:
    return copy.deepcopy(SMALLEST) | keys


def method(spec: Any) -> dict[str, Any]:
    return changed(methods={"x": spec})


def test_everything_but_models_and_methods_has_a_default() -> None:
    filled = config.load(SMALLEST)
    assert filled.workloads["chat"].batch_size == 64
    assert filled.dataset.selection == "human_first"
    assert filled.protocol.name == "standard"
    assert filled.padding("chat") == "none"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(worklods={}), ["worklods", "did you mean 'workloads'"]),
        (changed(results="my results"), ["results", "'my results'", "folder's path"]),
        (changed(results="~/x"), ["results", "'~/x'", "folder's path"]),
        (changed(results=""), ["results", "folder's path"]),
        (changed(dataset={"seed": -1}), ["dataset.seed", "-1", "greater than or equal to 0"]),
        (changed(dataset={"seed": 2**32}), ["dataset.seed", "less than"]),
        (
            changed(models={"m": {"source": HUB, "dtpe": "auto"}}),
            ["models.m", "'dtpe'", "did you mean 'dtype'"],
        ),
        (
            changed(models={"m": {"source": HUB | {"revision": "main"}}}),
            ["models.m.source.revision", "'main'", "commit"],
        ),
        (changed(models={"m": {"source": HUB | {"path": "x"}}}), ["models.m.source", "exactly one"]),
        (changed(models={"m": {}}), ["models.m.source", "missing"]),
        (changed(models={}), ["models", "at least 1"]),
        (changed(models={"a b": {"source": HUB}}), ["'a b'"]),
        ({"methods": SMALLEST["methods"]}, ["models", "missing"]),
        (method({"press": "KnormPres"}), ["methods.x.press", "'KnormPres'", "did you mean 'KnormPress'"]),
        (method({"press": "BasePress"}), ["methods.x.press", "'BasePress'"]),
        (
            method({"press": "KnormPress", "args": {"compresion_ratio": 0.5}}),
            ["methods.x.args.compresion_ratio", "did you mean 'compression_ratio'"],
        ),
        (
            method({"press": "KnormPress", "args": {"compression_ratio": 1.0}}),
            ["compression_ratio", "1.0", "[0, 1)"],
        ),
        (method({"press": "KnormPress", "args": {"compression_ratio": -0.1}}), ["-0.1", "[0, 1)"]),
        (method({"press": "KnormPress", "args": {"compression_ratio": "high"}}), ["'high'", "float"]),
        (method({"press": "SnapKVPress", "args": {"window_size": 1.5}}), ["window_size", "1.5", "int"]),
        (method({"press": "KnormPress", "kept_tokens": 0}), ["methods.x.kept_tokens", "0", "greater than or equal"]),
        (
            method({"press": "KnormPress", "args": {"compression_ratio": 0.5}, "kept_tokens": 240}),
            ["methods.x.args.compression_ratio", "kept_tokens", "leave one of them out"],
        ),
        (
            method(
                {
                    "press": "AdaKVPress",
                    "args": {"press": {"press": "KnormPress", "args": {"compression_ratio": 0.5}}},
                    "kept_tokens": 240,
                }
            ),
            ["methods.x.args.press.args.compression_ratio", "leave one of them out"],
        ),
        (
            method({"press": "AdaKVPress", "args": {"press": {"press": "KnormPress", "kept_tokens": 9}}}),
            ["methods.x.args.press.kept_tokens", "not a key of a press"],
        ),
        (method({"press": "ThinKPress", "kept_tokens": 9}), ["methods.x.kept_tokens", "ThinKPress has no"]),
        (method({"press": "ComposedPress", "args": {"presses": []}, "kept_tokens": 9}), ["ComposedPress has no"]),
        (method({"press": "AdaKVPress"}), ["methods.x.args", "needs the argument 'press'"]),
        (
            method({"press": "AdaKVPress", "args": {"press": "SnapKVPress"}}),
            ["methods.x.args.press", "class name"],
        ),
        (
            method({"press": "AdaKVPress", "args": {"press": {"press": "SnapKVPres"}}}),
            ["methods.x.args.press.press", "did you mean 'SnapKVPress'"],
        ),
        (
            method({"press": "AdaKVPress", "args": {"press": {"press": "ThinKPress"}}}),
            ["ThinKPress is no ScorerPress"],
        ),
        (
            method(
                {
                    "press": "ComposedPress",
                    "args": {"presses": [{"press": "KnormPress", "args": {"ratio": 1}}]},
                }
            ),
            ["methods.x.args.presses[0].args.ratio", "it takes: compression_ratio"],
        ),
        (method("dense"), ["methods.x", "'dense'", "a method is none"]),
        (method({"dms": {"checkpoint": "nvidia/x"}}), ["methods.x.dms", "revision"]),
        (
            method({"dms": {"checkpoint": "nvidia/x", "revision": COMMIT, "threshold": 2.0}}),
            ["methods.x.dms: threshold: 2: a DMS checkpoint decides by its own code"],
        ),
        (method({"dms": {"adapter": "a", "threshold": float("nan")}}), ["methods.x.dms.threshold", "nan", "finite"]),
        (method({"dms": {"adapter": "a", "threshold": float("inf")}}), ["methods.x.dms.threshold", "inf", "finite"]),
        (method({"dms": {"adapter": "a", "threshold": "2"}}), ["methods.x.dms.threshold", "'2'", "valid number"]),
        (method({"dms": {"adapter": "a", "treshold": 2.0}}), ["methods.x.dms", "did you mean 'threshold'"]),
        (method({"press": "KnormPress", "threshold": 2.0}), ["methods.x", "unknown key 'threshold'"]),
        (method({"dms": {}}), ["methods.x.dms", "exactly one of the keys checkpoint, adapter"]),
        (
            changed(workloads={"w": {"batch_size": 0}}),
            ["workloads.w.batch_size", "0", "greater than or equal to 1"],
        ),
        (changed(workloads={"w": {"batch_size": "4"}}), ["workloads.w.batch_size", "'4'", "integer"]),
        (changed(workloads={"w": {"batch_size": True}}), ["workloads.w.batch_size", "True"]),
        (changed(workloads={"w": {"new_tokens": 1}}), ["workloads.w.new_tokens", "1"]),
        (changed(workloads={"w": {"padding": "article"}}), ["workloads.w.padding", "protocol.name: article"]),
        (changed(protocol={"name": "standrd"}), ["protocol.name", "'standrd'", "'standard' or 'article'"]),
        (
            changed(variants=[{"model": "m", "method": "knorm"}]),
            ["variants[0].method", "did you mean 'knorm-0.8'"],
        ),
        (changed(variants=[{"model": "m", "method": "baseline"}] * 2), ["variants[1]", "twice"]),
        (changed(dataset={"source": {"path": "nowhere.json"}}), ["dataset.source.path", "nowhere.json"]),
        (changed(dataset={"source": HUB}), ["dataset.source", "'file'"]),
        (
            changed(models={"m": {"source": {"random": "Qwen/Qwen3-8b"}}}),
            ["random", "did you mean 'Qwen/Qwen3-8B'"],
        ),
        (
            changed(models={"m": {"source": {"random": "Qwen/Qwen3-8B"}, "trust_remote_code": True}}),
            ["models.m.trust_remote_code", "hub source"],
        ),
        (changed(models={"m": {"source": HUB, "base": "n"}}), ["models.m.base", "'n'"]),
        (
            changed(
                models={"m": {"source": {"random": "Qwen/Qwen3-8B"}}},
                workloads={"w": {"prompt_tokens": 40900}},
            ),
            ["workloads.w", "40900", "40960"],
        ),
    ],
)
def test_a_bad_config_is_one_error_that_names_key_and_value(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load(data)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_every_problem_is_named_at_once() -> None:
    bad = changed(workloads={"w": {"padding": "article"}}, variants=[{"model": "n", "method": "baseline"}])
    with pytest.raises(UserError, match="workloads.w.padding.*variants"):
        config.load(bad)


def test_keys_given_twice_are_found_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("models:\n  a: {x: 1}\n  a: {x: 2}\nmethods: {b: none, b: none}\n")
    with pytest.raises(UserError) as caught:
        config.load(SMALLEST, [str(file)])
    assert "run.yaml line 3: the key 'a' is given twice" in str(caught.value)
    assert "the key 'b' is given twice" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("merged.yaml", "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a}\n"), ("tabs.json", '{\n\t"models": {}\n}')],
)
def test_files_that_snakemake_reads_are_no_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert config.load(SMALLEST, [str(tmp_path / name)]).results == "results"


def test_a_local_model_that_is_too_short_is_told_before_any_job(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    with pytest.raises(UserError) as caught:
        config.load(changed(models={"m": {"source": {"path": str(tmp_path)}}}))
    assert "workloads.chat: 1024 prompt + 100 new tokens are more than the 512" in str(caught.value)
    assert "outputs: 1024 max_prompt_tokens + 100 new_tokens are more than the 512" in str(caught.value)
    shorter = {"workloads": {"w": {"prompt_tokens": 64}}, "outputs": {"max_prompt_tokens": 412}}
    shorter |= {"quality": {"windows": 0}, "models": {"m": {"source": {"path": str(tmp_path)}}}}
    assert config.load(changed(**shorter)).outputs.max_prompt_tokens == 412


@pytest.mark.parametrize("text", ["[]", '{"max_position_embeddings": null}', '{"max_position_embeddings": {}}', "{"])
def test_a_local_models_broken_config_is_left_to_its_fetching(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert config.load(changed(models={"m": {"source": {"path": str(tmp_path)}}})).models["m"]


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chats.json").touch()
    found = config.load(changed(dataset={"source": {"path": "~/chats.json"}}))
    assert found.dataset.source.path == tmp_path / "chats.json"


def test_a_budget_is_part_of_a_method_only_where_it_is_set() -> None:
    budget = {"press": "AdaKVPress", "args": {"press": {"press": "KnormPress"}}, "kept_tokens": 240}
    loaded = config.load(changed(methods=SMALLEST["methods"] | {"kept": budget}))
    assert grid.method_spec(loaded, "baseline") == {}
    assert grid.method_spec(loaded, "knorm-0.8") == SMALLEST["methods"]["knorm-0.8"]
    assert grid.method_spec(loaded, "kept") == budget


def test_an_adapter_is_checked_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = method({"dms": {"adapter": "mine"}})
    with pytest.raises(UserError, match=f"methods.x.dms.adapter: no {layout.HEADS} in 'mine'"):
        config.load(asked)
    Path("mine").mkdir()
    Path("mine", layout.HEADS).write_bytes(b"heads")
    spec = grid.method_spec(config.load(asked), "x")
    assert spec == {"dms": {"adapter": "mine", "files": {layout.HEADS: hashlib.sha256(b"heads").hexdigest()}}}
    Path("mine", layout.LORA).touch()
    with pytest.raises(UserError, match="has adapter_model.safetensors without its other half"):
        config.load(asked)


def test_a_threshold_is_part_of_a_method_only_where_it_is_not_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", layout.HEADS).write_bytes(b"heads")
    asked = {f"t{value}": {"dms": {"adapter": "mine", "threshold": value}} for value in (0, -0.0, 2, -1.5)}
    loaded = config.load(changed(methods={"usual": {"dms": {"adapter": "mine"}}} | asked))
    usual: Any = grid.method_spec(loaded, "usual")
    assert grid.method_spec(loaded, "t0") == grid.method_spec(loaded, "t-0.0") == usual
    for name, value in (("t2", 2.0), ("t-1.5", -1.5)):
        assert grid.method_spec(loaded, name) == {"dms": usual["dms"] | {"threshold": value}}
    resolved: Any = grid.plan(loaded)["config"]
    assert resolved["methods"]["t2"]["dms"]["threshold"] == 2.0


def test_a_dms_checkpoints_spec_has_no_threshold() -> None:
    spec: Any = grid.method_spec(config.load(dms_config("all")), "dms")
    assert "threshold" not in spec["dms"] and spec["dms"]["revision"] == COMMIT


def test_an_adapter_that_is_not_here_may_come_with_kvbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvbench/adapters/x").mkdir(parents=True)
    (tmp_path / "kvbench/adapters/x" / layout.HEADS).write_bytes(b"theirs")
    monkeypatch.setattr(layout, "KVBENCH", tmp_path / "kvbench")
    monkeypatch.chdir(tmp_path)
    folder = Path("adapters/x")
    assert layout.contents(folder) == [tmp_path / "kvbench" / folder / layout.HEADS] and layout.problem(folder) is None
    folder.mkdir(parents=True)
    (folder / layout.HEADS).write_bytes(b"mine")
    assert layout.contents(folder) == [folder / layout.HEADS]


def dms_config(variants: Any) -> dict[str, Any]:
    checkpoint = {"hub": "nvidia/Qwen3-8B-DMS-8x", "revision": COMMIT}
    return changed(
        models={"q": {"source": HUB}, "d": {"source": checkpoint, "base": "q", "trust_remote_code": True}},
        methods={"baseline": "none", "dms": {"dms": {"checkpoint": checkpoint["hub"], "revision": COMMIT}}},
        variants=variants,
    )


def test_a_dms_checkpoint_is_paired_with_its_own_model_and_compared_with_its_base() -> None:
    found = grid.variants(config.load(dms_config("all")))
    assert [(v.model, v.method, v.baseline) for v in found] == [
        ("q", "baseline", "baseline"),
        ("d", "dms", "baseline"),
    ]
    assert found[1].source_of_tokens == "q"


def test_what_all_would_leave_out_is_told() -> None:
    typo = dms_config("all")
    typo["models"]["d"]["source"] = typo["models"]["d"]["source"] | {"revision": "0" * 40}
    with pytest.raises(UserError) as caught:
        config.load(typo)
    assert "methods.dms: it fits no model" in str(caught.value)
    assert "models.d: no method fits it" in str(caught.value) and "models.q" not in str(caught.value)


def test_a_model_may_be_there_for_another_ones_tokens_alone() -> None:
    alone = dms_config("all")
    del alone["methods"]["baseline"]
    assert [variant.model for variant in grid.variants(config.load(alone))] == ["d"]


def test_a_dms_checkpoint_on_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"variants\[0\].*not that repository"):
        config.load(dms_config([{"model": "q", "method": "dms"}]))


def test_labels_name_the_model_only_where_the_method_is_ambiguous() -> None:
    two = changed(models={"m": {"source": HUB}, "n": {"source": HUB}})
    assert [v.label for v in grid.variants(config.load(two))] == [
        "m/baseline", "m/knorm-0.8", "n/baseline", "n/knorm-0.8",
    ]  # fmt: skip
    assert grid.variants(config.load(two))[3].baseline == "n/baseline"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_junk_gives_anything_but_a_user_error(junk: Any) -> None:
    for key in ("models", "methods", "workloads", "dataset", "variants", "protocol"):
        try:
            config.load(changed(**{key: junk}))
        except UserError:
            continue
