"""A variant in lm-evaluation-harness: dense, it is the harness's own model; compressed, what it says it is."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import dms_reference
import tiny
import tinyrun
from kvbench import config, harness, methods, rows, sources
from kvbench.decode import continue_from, prefill
from kvbench.dms import evict
from kvbench.errors import UserError
from kvbench.lm_eval_model import CompressedLM

DATA = Path(__file__).parent.parent / "data" / "tasks"
KNORM = {"press": "KnormPress", "args": {"compression_ratio": 0.6}}
ADAKV = {"press": "AdaKVPress", "args": {"press": {"press": "SnapKVPress", "args": {"compression_ratio": 0.6}}}}
MARKER = "Question:"
TEXT = "the cache keeps what a model has read and a press throws most of it away again before it writes " * 5
PAIRS = [
    (f"{TEXT}\nQuestion: what keeps it\nAnswer:", " the cache"),
    (f"{TEXT}\nQuestion: what keeps it\nAnswer:", " a"),
    (f"{TEXT}\nQuestion: what keeps it\nAnswer:", " most of it"),
    ("it writes\nQuestion: what writes\nQuestion: and reads\nAnswer: ", "a model"),
    ("", "a press throws"),
    (TEXT * 8 + "Question: too long?", " it is cut"),
    (TEXT * 8 + "Question: too long?", " it"),
]
UNTIL = {"until": ["the", "again"], "max_gen_toks": 16, "do_sample": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the workflow has fetched the tiny model of its config.yaml."""
    folder = tmp_path_factory.mktemp("run")
    tinyrun.make(folder, methods={"baseline": "none", "knorm-0.6": KNORM})
    manifest = folder / "results/models/tiny/manifest.json"
    manifest.parent.mkdir(parents=True)
    sources.fetch_model("tiny", {"path": str(folder / "model")}, manifest)
    return folder


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> Any:
    return AutoTokenizer.from_pretrained(run / "model")


@pytest.fixture(scope="module")
def reference(tokenizer: Any) -> HFLM:
    return HFLM(pretrained=tiny.model(), tokenizer=tokenizer, device="cpu", batch_size=1)


def compressed(tokenizer: Any, spec: dict[str, Any], marker: str | None = None) -> CompressedLM:
    return CompressedLM(tiny.model(), tokenizer, methods.build(spec), marker)


def asked(kind: str, pairs: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]


def likelihoods(lm: Any, pairs: list[Any]) -> list[tuple[float, bool]]:
    return [(round(value, 3), greedy) for value, greedy in lm.loglikelihood(asked("loglikelihood", pairs))]


@pytest.mark.parametrize("marker", [None, " "], ids=["query-aware", "question apart"])
def test_dense_likelihoods_are_those_of_the_harness(tokenizer: Any, reference: HFLM, marker: str | None) -> None:
    ours = compressed(tokenizer, {}, marker).loglikelihood(asked("loglikelihood", PAIRS))
    theirs = reference.loglikelihood(asked("loglikelihood", PAIRS))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("marker", [None, " "], ids=["query-aware", "question apart"])
def test_dense_answers_are_those_of_the_harness(tokenizer: Any, reference: HFLM, marker: str | None) -> None:
    pairs = [(context, settings) for context, _ in PAIRS if context for settings in (UNTIL, {"max_gen_toks": 40})]
    ours = compressed(tokenizer, {}, marker).generate_until(asked("generate_until", pairs))
    theirs = [reference.generate_until(asked("generate_until", [pair]))[0] for pair in pairs]
    assert ours == theirs
    assert any(ours)


@pytest.mark.parametrize("spec", [KNORM, ADAKV], ids=["frees", "masks"])
def test_continuations_of_a_shared_prompt_do_not_see_each_other(tokenizer: Any, spec: dict[str, Any]) -> None:
    pairs = PAIRS[:3]
    alone = [likelihoods(compressed(tokenizer, spec), [pair])[0] for pair in pairs]
    lm = compressed(tokenizer, spec)
    assert likelihoods(lm, pairs) == alone and len(lm.kept) == 1
    assert likelihoods(lm, pairs[::-1]) == alone[::-1]


@pytest.fixture
def dms(tokenizer: Any, tmp_path: Path) -> CompressedLM:
    evict.save(dms_reference.heads(0.3, 12), tmp_path)
    method = methods.build({"dms": {"adapter": str(tmp_path)}})
    return CompressedLM(deepcopy(tiny.model()), tokenizer, method, None)


def test_dms_answers_as_it_does_elsewhere(tokenizer: Any, dms: CompressedLM) -> None:
    ids = tokenizer.encode(TEXT)
    (expected,) = rows.generate_rows(dms.model, [ids], dms.method, 20, dms.ends)
    assert isinstance(expected, rows.Row)
    (found,) = dms.generate_until(asked("generate_until", [(TEXT, {"max_gen_toks": 20})]))
    assert found == tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert 0 < dms.kept[0].fraction < 0.9 and not dms.kept[0].simulated


def test_dms_scores_continuations_of_a_shared_prompt_and_of_none(dms: CompressedLM) -> None:
    pairs = [*PAIRS[:3], ("", "a press throws")]
    alone = [likelihoods(dms, [pair])[0] for pair in pairs]
    assert likelihoods(dms, pairs) == alone


@pytest.mark.parametrize("marker", [None, MARKER], ids=["query-aware", "question apart"])
def test_what_comes_before_the_question_is_compressed_or_all_but_the_last_token(
    tokenizer: Any, marker: str | None
) -> None:
    context, continuation = PAIRS[0]
    ids, after = tokenizer.encode(context), tokenizer.encode(continuation)
    first = len(tokenizer.encode(context[: context.rindex(MARKER)])) if marker else len(ids) - 1
    method = methods.build(KNORM)
    with torch.no_grad():
        _, cache = prefill(tiny.model(), torch.tensor([ids[:first]]), method)
        read = torch.tensor([ids[first:] + after[:-1]])
        logits = continue_from(tiny.model(), cache, read, method, first)[0, -len(after) :]
    expected = float(logits.log_softmax(-1)[range(len(after)), after].sum())
    lm = compressed(tokenizer, KNORM, marker)
    ((found, _),) = lm.loglikelihood(asked("loglikelihood", [PAIRS[0]]))
    assert found == pytest.approx(expected, abs=1e-4)
    assert lm.kept[0].fraction == pytest.approx(0.4, abs=0.01) and not lm.kept[0].simulated


def test_a_token_that_holds_the_end_of_the_text_and_the_markers_beginning_is_the_questions(tokenizer: Any) -> None:
    lm = compressed(tokenizer, KNORM, "q")
    context = "the cache keeps what a model has read. Question: which, and why is a question asked"
    first, rest = lm._split(context, lm.tok_encode(context), 100)
    assert "q" in tokenizer.decode(rest[:1]) and first == tokenizer.encode(context)[: len(first)]
    assert len(first) + len(rest) == len(tokenizer.encode(context))


def test_what_is_kept_while_decoding_is_that_after_the_answer(tokenizer: Any) -> None:
    spec = {"press": "DecodingPress", "args": {"base_press": {"press": "KnormPress"}, "compression_interval": 4}}
    spec["args"] |= {"target_size": 16}  # type: ignore[operator]
    lm = compressed(tokenizer, spec)
    lm.generate_until(asked("", [(TEXT[:200], {"until": [], "max_gen_toks": 20})]))
    assert len(lm.kept) == 1 and lm.kept[0].fraction < 0.5
    lm.loglikelihood(asked("loglikelihood", PAIRS[:3]))
    assert len(lm.kept) == 2


def test_compression_reaches_the_first_token_of_an_answer(tokenizer: Any) -> None:
    one_token = [(context, continuation[:2]) for context, continuation in PAIRS[:1]]
    assert likelihoods(compressed(tokenizer, KNORM), one_token) != likelihoods(compressed(tokenizer, {}), one_token)


def test_answers_do_not_depend_on_what_they_are_batched_with(tokenizer: Any) -> None:
    texts = [TEXT[:180], TEXT[20:200], TEXT[:180], TEXT[40:260]]
    pairs = [
        (text, {"until": until, "max_gen_toks": 20}) for text, until in zip(texts, ["a", "it", "zz", []], strict=True)
    ]
    alone = [compressed(tokenizer, KNORM).generate_until(asked("", [pair]))[0] for pair in pairs]
    assert compressed(tokenizer, KNORM).generate_until(asked("", pairs)) == alone


def test_prompts_that_lost_their_beginning_are_counted(tokenizer: Any) -> None:
    lm = compressed(tokenizer, {})
    lm.loglikelihood(asked("loglikelihood", PAIRS))
    assert lm.cut_prompts == 1


@pytest.mark.parametrize(
    ("spec", "marker", "kind", "arguments", "words"),
    [
        ({}, None, "loglikelihood_rolling", ("text",), "no prompt that could be compressed"),
        ({}, None, "generate_until", ("text", {"do_sample": True, "temperature": 1.0}), "do_sample=False"),
        ({}, None, "generate_until", ("text", {"max_gen_toks": 600}), "no room for a prompt in 512 tokens"),
        ({}, "Frage:", "generate_until", ("text", {}), "'Frage:' is not in the prompt.*query-aware"),
        (KNORM, MARKER, "generate_until", ("Question: what is read", {}), "Nothing stands before.*query-aware"),
        (KNORM, MARKER, "loglikelihood", ("Question: what is read", " all"), "Nothing stands before.*query-aware"),
        (
            {"press": "SnapKVPress", "args": {"compression_ratio": 0.5}},
            None,
            "generate_until",
            ("it writes", {}),
            "cannot be compressed: SnapKVPress refuses",
        ),
    ],
)
def test_what_cannot_be_measured_so_is_refused(
    tokenizer: Any, spec: dict[str, Any], marker: str | None, kind: str, arguments: Any, words: str
) -> None:
    lm = compressed(tokenizer, spec, marker)
    with pytest.raises(UserError, match=words):
        getattr(lm, kind)(asked(kind, [arguments]))


@pytest.fixture
def inside(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run's folder as working directory, with the tasks' files, and the datasets' cache in it; no other tasks."""
    import datasets

    monkeypatch.chdir(run)
    monkeypatch.setattr(tempfile, "tempdir", str(run))  # a device's lock of its own: nothing is timed here
    monkeypatch.setattr(harness, "TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(run / "cache"))
    shutil.copytree(DATA, run, dirs_exist_ok=True)
    yield run


def evaluate(monkeypatch: pytest.MonkeyPatch, *more: str, tasks: str = "kvbench_choices") -> dict[str, Any]:
    import evaluate_tasks

    arguments = ["--config", "config.yaml", "--model", "tiny", "--include-path", str(DATA), "--output", "out.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", *arguments, "--tasks", *tasks.split(), *more])
    evaluate_tasks.main()
    found: dict[str, Any] = json.loads(Path("out.json").read_text())
    return found


def test_tasks_of_local_files_run_on_a_variant(
    inside: Path, reference: HFLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = "kvbench_choices kvbench_answers"
    dense = evaluate(monkeypatch, "--method", "baseline", "--query-aware", tasks=both)
    manager = TaskManager(include_path=str(DATA), include_defaults=False)
    theirs = simple_evaluate(model=reference, tasks=both.split(), task_manager=manager)
    assert theirs is not None
    for task, metric in (("kvbench_choices", "acc,none"), ("kvbench_answers", "exact_match,none")):
        assert dense["results"][task][metric] == theirs["results"][task][metric]
    assert dense["kvbench"]["kept_fraction"] == 1.0 and dense["kvbench"]["query_aware"]
    printed = capsys.readouterr().out
    assert f"kvbench_choices: acc (none) {dense['results']['kvbench_choices']['acc,none']:.4f} ± " in printed
    knorm = evaluate(monkeypatch, "--method", "knorm-0.6", "--question-marker", MARKER, "--limit", "2")
    assert knorm["n-samples"]["kvbench_choices"] == {"original": 4, "effective": 2}
    assert knorm["kvbench"]["kept_fraction"] == pytest.approx(0.4, abs=0.01)
    assert knorm["kvbench"]["question_marker"] == MARKER and knorm["kvbench"]["spec"] == KNORM


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "knorm-0.5"], "no method 'knorm-0.5'; did you mean 'knorm-0.6'"),
        (["--method", "baseline", "--model", "big"], "no model 'big'"),
        (["--method", "baseline", "--config", "no.yaml"], "no.yaml cannot be read"),
        (["--method", "baseline", "--question-marker", ""], "empty"),
    ],
)
def test_bad_input_is_one_error(inside: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str) -> None:
    query = [] if "--question-marker" in more else ["--query-aware"]
    with pytest.raises(UserError, match=words):
        evaluate(monkeypatch, *more, *query)


def test_a_task_that_does_not_exist_is_named(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "TaskManager", TaskManager)
    with pytest.raises(UserError, match="no task 'kvbench_choice'; did you mean 'kvbench_choices'"):
        evaluate(monkeypatch, "--method", "baseline", "--query-aware", tasks="gsm8k ruler gpqa kvbench_choice")


def test_a_model_that_is_not_fetched_says_how(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tinyrun.config(inside) | {"results": "elsewhere"}
    Path("other.yaml").write_text(json.dumps(data))
    assert config.load(data).results == "elsewhere"
    with pytest.raises(UserError, match="elsewhere/models/tiny/manifest.json is missing.*snakemake"):
        evaluate(monkeypatch, "--method", "baseline", "--query-aware", "--config", "other.yaml")
