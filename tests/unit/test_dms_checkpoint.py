"""NVIDIA's DMS checkpoint, by a stand-in: its bytes, its limits, and what is said where it is not as it is known."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_hub
import torch
import transformers

import dms_checkpoint as standin
import tiny
import tinyrun
from kvbench import decode, distribution, engines, loading, measure, methods, nvml, recall, rows, sources
from kvbench.cache import cache_bytes, full_cache_bytes
from kvbench.dms.nvidia import Checkpoint
from kvbench.errors import Unsupported, UserError
from kvbench.haystack import Prompt
from kvbench.kept import kept
from kvbench.manifest import Manifest
from kvbench.window_table import Window

fetch, hub, COMMIT = test_hub.fetch, test_hub.hub, test_hub.COMMIT  # fixtures, and the commit that the hub has

KNOWN = "is not as kvbench knows it at da1535fc"
ONCE = measure.Effort(1, 1, 1.0, 1)


@dataclass(frozen=True)
class Ready:
    model: Any
    method: Checkpoint


def nothing(_: Any = None) -> None:
    return None


def load(manifest: Manifest, spec: dict[str, Any] = standin.SPEC, attention: str = "sdpa") -> Ready:
    """As a job does it."""
    method = methods.build(spec)
    assert isinstance(method, Checkpoint)
    with method.loading(manifest):
        model = loading.load_model(manifest, "auto", attention, torch.device("cpu")).model
    method.check(model, 2)
    return Ready(model, method)


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """flash-attn's stand-in on the path, and a folder for the code that transformers copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(standin.PACKAGES)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.save(tmp_path_factory.mktemp("tiny-dms"))


@pytest.fixture(scope="module")
def ready(folder: Path) -> Ready:
    return load(standin.manifest(folder))


def by_the_rule(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens, each from a prompt's pass over the whole sequence."""
    found = ids
    with torch.no_grad():
        for _ in range(new_tokens):
            found = torch.cat([found, model(found).logits[:, -1:].argmax(-1)], 1)
    return found[:, ids.shape[1] :]


# --- what it does ---


def test_its_code_runs_from_the_manifests_folder(ready: Ready) -> None:
    assert type(ready.model).__module__.endswith(".modeling_qwen3_dms")
    assert ready.model.config.dms_window_size == standin.WINDOW and ready.model.config.pad_token_id is None


@pytest.mark.parametrize("tokens", [1, 2, 100, 257, 400, 520])
def test_a_step_at_a_time_gives_what_the_whole_prompt_gives(ready: Ready, tokens: int) -> None:
    ids = tiny.ids(2, tokens, tokens)
    engine = engines.engine("auto", ids.device)
    found = engine.generate(ready.model, ids, ready.method, 8, nothing, nothing).tokens
    assert found.tolist() == by_the_rule(ready.model, ids, 8).tolist()


def test_bytes_are_those_of_its_own_cache(ready: Ready) -> None:
    ids = tiny.ids(2, 400)
    _, cache = decode.prefill(ready.model, ids, ready.method)
    config, measured = ready.model.config, cache_bytes(cache)
    token = 2 * config.head_dim * 4  # keys and values of a head, float32
    lengths = [layer.cache_seq_lengths for layer in cache.layers]
    assert measured.live == sum(int(length.sum()) for length in lengths) * token
    assert measured.allocated == config.num_hidden_layers * 2 * config.num_key_value_heads * standin.POOL * token
    full = full_cache_bytes(config, 2, 400, 4)
    assert 0.6 * full < measured.live < full < measured.allocated  # the pool is more than the full cache
    assert len({int(n) for length in lengths for n in length}) > 2  # each row and head has its own
    state = kept(ready.model, cache, 2, 400)
    assert state.fraction == measured.live / full and not state.simulated


def test_what_was_achieved_is_told_with_window_and_block_size(ready: Ready) -> None:
    _, cache = decode.prefill(ready.model, tiny.ids(2, 400), ready.method)
    facts = ready.method.facts(cache)
    share = cache_bytes(cache).live / full_cache_bytes(ready.model.config, 2, 400, 4)
    assert (facts["window"], facts["block_size"]) == (standin.WINDOW, standin.BLOCK)
    assert facts["kept_fraction"] == pytest.approx(share) and facts["compression_factor"] == pytest.approx(1 / share)
    _, short = decode.prefill(ready.model, tiny.ids(2, standin.WINDOW + 1), ready.method)
    assert ready.method.facts(short)["kept_fraction"] == 1.0  # nothing has left the window


def test_the_pool_grows_where_more_is_kept_than_it_holds(tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 4096, "dms_initial_alpha_offset": 1e9}  # nothing is evicted
    made = load(standin.manifest(standin.save(tmp_path / "all-kept", **changes)))
    _, cache = decode.prefill(made.model, tiny.ids(1, standin.POOL + 10), made.method)
    assert made.method.facts(cache)["kept_fraction"] == 1.0
    assert (
        len(cache.layers[0].key_blocks) == 1.5 * made.model.config.num_key_value_heads * standin.POOL // standin.BLOCK
    )


def test_prompts_of_different_lengths_get_the_tokens_that_each_gets_alone(ready: Ready) -> None:
    prompts = [tiny.ids(1, tokens, tokens)[0].tolist() for tokens in (5, 300, 33, 300)]
    for prompt, answer in zip(prompts, rows.generate_rows(ready.model, prompts, ready.method, 6), strict=True):
        assert isinstance(answer, rows.Row)
        assert [answer.tokens] == by_the_rule(ready.model, torch.tensor([prompt]), 6).tolist()
        assert not answer.simulated


def test_given_tokens_and_questions_are_read_one_at_a_time(ready: Ready) -> None:
    ids = tiny.ids(2, 320)
    with torch.no_grad():
        expected = ready.model(ids).logits[:, 300:]
    _, cache = decode.prefill(ready.model, ids[:, :300], ready.method)
    torch.testing.assert_close(decode.continue_from(ready.model, cache, ids[:, 300:], ready.method, 300), expected)

    windows = [Window("book", "x", i, row[:300], row[300:]) for i, row in enumerate(ids.tolist())]
    for part in distribution.against_full(ready.model, ready.method, windows, tiny.model("Qwen3")):
        assert (part["kl"] > 0).all() and 0.6 < part["kept_fraction"] < 1 and not part["simulated"]


def test_a_question_after_the_compressed_text_is_answered(ready: Ready) -> None:
    class Ids:
        eos_token_id = None

        def decode(self, tokens: list[int], **_: Any) -> list[int]:
            return tokens

    prompts = [Prompt(row[:300], row[300:], 5) for row in tiny.ids(2, 320).tolist()]
    for prompt, found in zip(prompts, recall.answers(ready.model, Ids(), ready.method, prompts, False), strict=True):
        whole = torch.tensor([prompt.context + prompt.question])
        assert [found["answer"]] == by_the_rule(ready.model, whole, 5).tolist()


# --- both protocols ---


def test_standard_measures_prefill_and_generation(ready: Ready) -> None:
    batch, watch = measure.Batch(tiny.ids(2, 300), None, 5, 0), nvml.Watch(None)
    engine = engines.engine("hf", batch.input_ids.device)
    (prefill,) = measure.prefill_standard(ready.model, batch, ready.method, ONCE, engine, watch)["repeats"]
    assert prefill["kv_cache_bytes"] < prefill["kv_cache_full_bytes"] < prefill["kv_cache_allocated_bytes"]
    (run,) = measure.generation_standard(ready.model, batch, ready.method, ONCE, engine, watch)["repeats"]
    assert len(run["token_times_s"]) == 5 and run["kv_cache_end_bytes"] >= prefill["kv_cache_bytes"]


def test_the_article_measures_its_padded_batch(ready: Ready) -> None:
    ids, mask = tiny.ids(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    batch = measure.Batch(ids, mask, 5, 0)
    (prefill,) = measure.prefill_article(ready.model, batch, ready.method, ONCE)["repeats"]
    assert prefill["kv_cache_bytes"] < prefill["kv_cache_full_bytes"] < prefill["kv_cache_allocated_bytes"]
    before = ready.model.generation_config.to_dict()
    (run,) = measure.generation_article(ready.model, batch, ready.method, ONCE)["repeats"]
    ready.model.generation_config.update(**before)
    assert run["total_s"] > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_the_articles_way_pads_are_seen_by_its_mask(ready: Ready, side: str) -> None:
    ids, mask = tiny.ids(2, 320), torch.ones(2, 320, dtype=torch.long)
    own = slice(40, None) if side == "left" else slice(None, 280)
    mask[1] = 0
    mask[1, own] = 1
    with ready.method.everywhere(ready.model), torch.no_grad():
        output = ready.model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True)
        alone = ready.model(ids[1:, own], use_cache=True)
    torch.testing.assert_close(output.logits[1, own], alone.logits[0])
    heads = ready.model.config.num_key_value_heads
    for layer, expected in zip(output.past_key_values.layers, alone.past_key_values.layers, strict=True):
        assert layer.cache_seq_lengths[heads:].tolist() == expected.cache_seq_lengths.tolist()


# --- what it cannot do ---


@pytest.mark.parametrize("name", ["graph", "compile"])
def test_engines_that_pack_refuse_it(ready: Ready, name: str) -> None:
    engine, ids = engines.engine(name, torch.device("cpu")), tiny.ids(2, 20)
    with pytest.raises(Unsupported, match=r"DMS checkpoint decodes with the code that it brings.*use engine: hf"):
        engine.prefill(ready.model, ids, ready.method)
    with pytest.raises(Unsupported, match=r"use engine: hf"):
        engine.generate(ready.model, ids, ready.method, 4, nothing, nothing)


@pytest.mark.parametrize("context", ["prefill", "decoding", "everywhere"])
def test_a_second_prompt_is_refused(ready: Ready, context: str) -> None:
    _, cache = decode.prefill(ready.model, tiny.ids(2, 20), ready.method)
    with (
        getattr(ready.method, context)(ready.model),
        pytest.raises(Unsupported, match="one prompt, then a token at a time: 7 tokens came after 20"),
    ):
        ready.model(tiny.ids(2, 7), past_key_values=cache, use_cache=True)


def test_pads_are_refused_where_lengths_are_equal_by_rule(ready: Ready) -> None:
    ids, mask = tiny.ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    with ready.method.prefill(ready.model), torch.no_grad():
        ready.model(input_ids=ids, attention_mask=mask, past_key_values=ready.method.cache(ready.model))
        mask[1, :4] = 0
        with pytest.raises(Unsupported, match="without pads; give it prompts of equal lengths"):
            ready.model(input_ids=ids, attention_mask=mask, past_key_values=ready.method.cache(ready.model))
    ready.model(input_ids=ids, attention_mask=mask)  # no hook is left behind


def test_no_other_method_reads_a_cache_that_is_not_the_models(ready: Ready) -> None:
    with pytest.raises(Unsupported, match="put a DMSCache in place of the DynamicCache"):
        decode.prefill(ready.model, tiny.ids(2, 20), methods.Dense())
    batch = measure.Batch(tiny.ids(2, 20), None, 4, 0)
    with pytest.raises(Unsupported, match="put a DMSCache in place of the DynamicCache"):
        measure.prefill_article(ready.model, batch, methods.Dense(), ONCE)


# --- what it must be ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"revision": "f" * 40}, ["at " + "f" * 40, "the same repository and revision"]),
        ({"source": {"hub": "someone/else"}}, ["tiny-dms is someone/else", "the same repository and revision"]),
        ({"source": {"path": "."}}, ["tiny-dms is None at"]),
        ({"trust_remote_code": False}, ["Read that code, then set `trust_remote_code: true`"]),
    ],
)
def test_another_repository_commit_or_no_trust(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    manifest = standin.manifest(folder, **changes)
    with pytest.raises(UserError) as error:
        load(manifest)
    standin.manifest(folder)
    assert all(word in str(error.value) for word in words)


def test_code_that_has_changed_since_it_was_fetched_does_not_run(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "changed"))
    manifest, code = standin.manifest(mine), mine / "dms_cache.py"
    code.write_text(code.read_text().replace("DMS", "SMD"))  # as many bytes
    with pytest.raises(UserError, match=r"dms_cache.py has changed since"):
        load(manifest)


@pytest.mark.parametrize("content", [None, "", "raise ImportError('undefined symbol')"])
def test_without_flash_attention_it_says_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p) != standin.PACKAGES])
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if content is not None:
        (tmp_path / "flash_attn.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unsupported, match=r"decodes with flash-attn, which cannot be used here: .*envs/dms.yaml"):
        load(standin.manifest(folder))
    sys.modules.pop("flash_attn", None)


def test_other_attention_kernels_are_refused(folder: Path) -> None:
    with pytest.raises(Unsupported, match="reads sdpa's masks, not eager's; set its model's attention: sdpa"):
        load(standin.manifest(folder), attention="eager")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("configuration", "self.dms_window_size =", "self.dms_window =", "Qwen3Config has no dms_window_size"),
        ("configuration", "**kwargs)\n", "**kwargs | {'rope_theta': 1e4})\n", "rotate by a base of 10000, its config"),
        ("modeling", "from transformers.models.qwen3 ", "from transformers.gone ", "ModuleNotFoundError"),
        ("modeling", "self.post_init()", "config.gone", "AttributeError: 'Qwen3Config' object has no"),
        ("modeling", "DMSCache", "OtherCache", "modeling_qwen3_dms has no DMSCache beside Qwen3ForCausalLM"),
        (
            "cache",
            "context_length: int,\n        accomodate",
            "context: int,\n        accomodate",
            "DMSCache cannot be",
        ),
        ("cache", "self.recent_info", "self.recent", "DMSPagedCacheLayer has no recent_info"),
        ("cache", "self.cache_seq_lengths", "self.lengths", "DMSPagedCacheLayer has no cache_seq_lengths"),
        ("cache", "self.page_batch, self.max_blocks", "2 * self.page_batch, self.max_blocks", "block_table of its"),
    ],
)
def test_whatever_is_not_as_known_is_named(
    folder: Path, tmp_path: Path, file: str, old: str, new: str, words: str
) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / f"changed-{abs(hash((old, new)))}"))
    (first,) = [path for path in mine.glob("*.py") if file in path.name]
    assert old in first.read_text()
    for path in mine.glob("*.py") if old == "DMSCache" else [first]:
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Unsupported) as error:
        found = load(standin.manifest(mine))
        decode.prefill(found.model, tiny.ids(2, 20), found.method)
    for part in (words, KNOWN, f"found transformers {transformers.__version__}", "envs/dms.yaml"):
        assert part in str(error.value)


def test_a_cache_of_other_shapes_is_named(ready: Ready) -> None:
    _, cache = decode.prefill(ready.model, tiny.ids(2, 20), ready.method)
    with pytest.raises(Unsupported, match=r"cache_seq_lengths of its cache's DMSPagedCacheLayer is \(4,\), not \(6,\)"):
        ready.method._must_be_known(cache, ready.model, 3)
    cache.layers[0].key_blocks = cache.layers[0].key_blocks[..., :8]
    with pytest.raises(Unsupported, match=r"key_blocks of its cache's DMSPagedCacheLayer is \(256, 1, 8\), not"):
        ready.method._must_be_known(cache, ready.model, 2)
    cache.layers.pop()
    with pytest.raises(Unsupported, match=r"its DMSCache has 1 layers, not 2"):
        ready.method._must_be_known(cache, ready.model, 2)


# --- fetched ---


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Manifest of a model with a tokenizer, which the checkpoint has not."""
    made = tmp_path / "base" / "manifest.json"
    tinyrun.save_model(tmp_path / "model")
    sources.fetch_model("base", {"path": str(tmp_path / "model")}, made)
    return made


def test_it_is_fetched_at_its_commit_with_its_code_and_its_bases_tokenizer(
    fetch: Any, hub: Any, folder: Path, base: Path
) -> None:
    hub.repos[f"models/{standin.REPOSITORY}"] = test_hub.Repo(
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    )
    trusted = ["--trust-remote-code", "--tokenizer-from", str(base)]
    manifest = fetch(hub=standin.REPOSITORY, revision=standin.REVISION, options=trusted)
    assert manifest.revision == standin.REVISION == COMMIT and manifest.trust_remote_code
    assert manifest.tokenizer == sources.load_manifest(base).tokenizer
    assert {entry["path"] for entry in manifest.files} >= {f"{name}.py" for name in standin.CODE}
    made, ids = load(manifest), tiny.ids(1, 300)
    assert COMMIT in type(made.model).__module__
    assert decode.generate(made.model, ids, made.method, 3).tokens.shape == (1, 3)


@pytest.mark.parametrize(
    ("revision", "options", "words"),
    [
        ("e" * 40, ["--trust-remote-code"], "e" * 40),
        (COMMIT, [], "has auto_map, so loading it would run Python code that comes with it. Read that code, then set"),
        (COMMIT, ["--trust-remote-code"], "ships no tokenizer. Name the model that lends it one as `base`"),
    ],
)
def test_another_revision_no_trust_and_no_base(
    fetch: Any, hub: Any, folder: Path, revision: str, options: list[str], words: str
) -> None:
    hub.repos[f"models/{standin.REPOSITORY}"] = test_hub.Repo(
        {path.name: path.read_bytes() for path in folder.iterdir()}
    )
    assert words in fetch(hub=standin.REPOSITORY, revision=revision, options=options)
