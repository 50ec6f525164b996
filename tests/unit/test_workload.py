"""Workloads: batches of equal length, the article's batch, random ids, and every reason to refuse one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvbench import batch, prompts, workload
from kvbench.errors import UserError
from kvbench.scan import Rules
from kvbench.workload import Request

STAGE = Path(workload.__file__).parents[1] / "workload.py"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def words(n, of="word"):
    return " ".join(f"{of}{k}" for k in range(n))


def chat(identity, *lengths, first="human"):
    roles = [first, "gpt", "human", "gpt", "human", "gpt"]
    messages = [
        {"from": role, "value": words(length, f"{identity}x")} for role, length in zip(roles, lengths, strict=False)
    ]
    return {"id": identity, "conversations": messages}


# 3 first messages are long, 5 more conversations are, 4 are short.
CHATS = [
    *(chat(f"long{n}", 200, 20) for n in range(3)),
    *(chat(f"whole{n}", 20, 40, 60, 80) for n in range(5)),
    *(chat(f"short{n}", 5, 6) for n in range(4)),
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer trained on a few words, without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words(500)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    """Make a workload of some chats with the tokenizer; ``make.path`` is where it lies."""
    from transformers import AutoTokenizer

    def run(
        chats=CHATS, template=TEMPLATE, context=4096, generation=None, side=None, selection="human_first", **request
    ):
        folder, data = tmp_path / "model", tmp_path / "chats.json"
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **({"padding_side": side} if side else {}))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        if generation:
            (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
        data.write_text(json.dumps(chats), "utf-8")
        dataset = manifest(tmp_path / "dataset.json", "dataset", tmp_path, files=[data.name])
        model = manifest(tmp_path / "model.json", "model", folder, tokenizer="model", context=context)
        rows = tmp_path / "prompts.parquet"
        prompts.select(data, rows, Rules(selection, 4387, 10, 0.0), {})
        run.path, run.prompts, run.tokenizer = tmp_path / "w.parquet", rows, AutoTokenizer.from_pretrained(folder)
        asked = {"batch_size": 2, "prompt_tokens": 64, "new_tokens": 8, "padding": "none", "seed": 1, **request}
        workload.run(model, rows, dataset, Request(**asked), run.path, {"code": "abc"})
        return batch.load(run.path), pq.read_table(run.path).to_pylist()

    return run


def manifest(path, kind, folder, files=(), **fields):
    entries = [{"path": name, "bytes": (folder / name).stat().st_size, "sha256": ""} for name in files]
    about = {
        "kind": kind, "name": path.stem, "source": {}, "revision": None, "path": str(folder), "files": entries,
        "licence": None, "fetched": "2024-01-01T00:00:00Z", **fields,
    }  # fmt: skip
    path.write_text(json.dumps(about), "utf-8")
    return path


@pytest.fixture
def random_model(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 50, "eos_token_id": 3}', "utf-8")
    return manifest(tmp_path / "shapes.json", "model", tmp_path, tokenizer=None, context=512)


def templated(tokenizer, *messages):
    text = "".join(f"<|start|>{role}\n{content}<|end|>\n" for role, content in messages)
    return tokenizer(text + "<|start|>assistant\n", add_special_tokens=False)["input_ids"]


# --- equal lengths ---


def test_first_long_prompts_in_rank_order(make):
    made, rows = make(batch_size=3, prompt_tokens=256)
    assert made.chat_template is True
    assert [len(row) for row in made.rows] == [256] * 3
    ranked = [row for row in pq.read_table(make.prompts).to_pylist() if row["conversation_id"].startswith("long")]
    assert [row["conversation_id"] for row in rows] == [row["conversation_id"] for row in ranked]
    for row, prompt in zip(rows, ranked, strict=True):
        assert row["input_ids"] == templated(make.tokenizer, ("user", prompt["prompt"]))[:256]
        assert (row["text_from"], row["prompt_tokens"]) == ("first_message", 256)
    ids, mask = made.arrays()
    assert (ids.shape, ids.dtype, mask) == ((3, 256), np.int64, None)


def test_whole_conversations_fill_the_batch(make):
    made, rows = make(batch_size=6, prompt_tokens=256)
    assert [row["text_from"] for row in rows] == ["first_message"] * 3 + ["conversation"] * 3
    assert len({row["source_index"] for row in rows}) == 6
    assert [len(row) for row in made.rows] == [256] * 6
    record = CHATS[rows[-1]["source_index"]]
    assert record["id"] == rows[-1]["conversation_id"]
    names = {"human": "user", "gpt": "assistant"}
    messages = [(names[each["from"]], each["value"]) for each in record["conversations"]]
    assert rows[-1]["input_ids"] == templated(make.tokenizer, *messages)[:256]


def test_conversations_are_the_same_when_few_fit_in_memory(make, monkeypatch):
    _, expected = make(batch_size=8, prompt_tokens=256)
    monkeypatch.setattr(workload, "CHARACTERS_AT_ONCE", 1)
    assert make(batch_size=8, prompt_tokens=256)[1] == expected


def test_too_few_says_how_many_there_were(make):
    with pytest.raises(
        UserError, match="3 first messages and 5 more whole conversations have 256 .* 9 are needed. Lower"
    ):
        make(batch_size=9, prompt_tokens=256)
    assert not make.path.exists()


def test_a_conversation_that_the_template_refuses_is_not_taken(make):
    odd = chat("odd", 20, 200, 20)
    odd["conversations"][2]["from"] = "system"
    with pytest.raises(UserError, match="0 first messages and 1 more whole conversations"):
        make([odd, chat("fine", 20, 200, 20)], prompt_tokens=256)


def test_without_a_chat_template(make):
    made, rows = make(template=None, batch_size=4, prompt_tokens=256)
    assert made.chat_template is False
    texts = [each["value"] for each in CHATS[rows[0]["source_index"]]["conversations"]]
    assert rows[0]["input_ids"] == make.tokenizer(texts[0])["input_ids"][:256]
    texts = [each["value"] for each in CHATS[rows[3]["source_index"]]["conversations"]]
    assert rows[3]["text_from"] == "conversation"
    assert rows[3]["input_ids"] == make.tokenizer("\n\n".join(texts))["input_ids"][:256]


def test_a_text_of_exactly_the_length_is_long_enough(make):
    one = [chat("one", 30, 30)]
    make(one, batch_size=1, prompt_tokens=8)
    length = len(templated(make.tokenizer, ("user", one[0]["conversations"][0]["value"])))
    made, rows = make(one, batch_size=1, prompt_tokens=length)
    assert (len(made.rows[0]), rows[0]["text_from"]) == (length, "first_message")
    assert make(one, batch_size=1, prompt_tokens=length + 1)[1][0]["text_from"] == "conversation"


# --- the article's batch ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_articles_batch(side, make):
    made, rows = make(batch_size=10, prompt_tokens=100, padding="article", side=side, selection="article")
    tokenizer = make.tokenizer
    texts = pq.read_table(make.prompts)["prompt"].to_pylist()[:10]
    tokenizer.pad_token = tokenizer.eos_token
    expected = tokenizer(texts, return_tensors="np", padding=True, truncation=True, max_length=100)
    ids, mask = made.arrays()
    assert np.array_equal(ids, expected["input_ids"])
    assert np.array_equal(mask, expected["attention_mask"])
    assert (made.padding, made.padding_side, made.chat_template) == ("article", side, False)
    assert made.pad_token_id == tokenizer.eos_token_id
    assert [row["prompt_tokens"] for row in rows] == mask.sum(axis=1).tolist()


def test_the_articles_batch_needs_enough_prompts(make):
    with pytest.raises(UserError, match="has 12 prompts, 13 are needed"):
        make(batch_size=13, padding="article")


# --- what is stored ---


def test_end_of_sequence_ids_are_the_generation_configs(make):
    made, _ = make(generation={"eos_token_id": [7, 9]})
    assert made.eos_token_ids == [7, 9]
    assert made.pad_token_id == make.tokenizer.eos_token_id


def test_metadata(make):
    made, _ = make()
    assert made.eos_token_ids == [make.tokenizer.eos_token_id]
    about = json.loads(pq.read_schema(make.path).metadata[b"kvbench"])
    assert about | {
        "padding": "none", "batch_size": 2, "prompt_tokens": 64, "new_tokens": 8, "seed": 1, "code": "abc",
        "chat_template": True, "model": "model",
    } == about  # fmt: skip


def test_no_workload_is_refused(tmp_path, make):
    make()
    for path in (tmp_path / "missing.parquet", make.prompts, tmp_path / "chats.json"):
        with pytest.raises(UserError, match="is no workload"):
            batch.load(path)


# --- random ids ---


def run_random(model, tmp_path, **request):
    asked = {"batch_size": 6, "prompt_tokens": 64, "new_tokens": 8, "padding": "none", "seed": 1, **request}
    workload.run(model, None, None, Request(**asked), tmp_path / "w.parquet", {})
    return batch.load(tmp_path / "w.parquet"), pq.read_table(tmp_path / "w.parquet").to_pylist()


def test_random_ids(random_model, tmp_path):
    made, rows = run_random(random_model, tmp_path)
    ids, mask = made.arrays()
    assert (ids.shape, mask) == ((6, 64), None)
    assert 0 <= ids.min() < ids.max() < 50
    assert {(row["text_from"], row["source_index"], row["conversation_id"]) for row in rows} == {("random", None, None)}
    assert (made.eos_token_ids, made.pad_token_id) == ([3], 3)
    assert np.array_equal(run_random(random_model, tmp_path)[0].arrays()[0], ids)
    assert not np.array_equal(run_random(random_model, tmp_path, seed=2)[0].arrays()[0], ids)


def test_random_lengths(random_model, tmp_path):
    lengths = {}
    for seed in range(10):
        made, _ = run_random(random_model, tmp_path, seed=seed, padding="article")
        lengths[seed] = [len(row) for row in made.rows]
        assert min(lengths[seed]) >= 4
        assert max(lengths[seed]) == 64
        assert made.arrays()[1].sum(axis=1).tolist() == lengths[seed]
    assert len({tuple(each) for each in lengths.values()}) == 10


# --- the command line ---


def test_longer_than_the_context_is_refused_before_anything_else(random_model, tmp_path):
    command = [sys.executable, str(STAGE), "--model-manifest", str(random_model), "--batch-size", "2"]
    command += ["--prompt-tokens", "500", "--new-tokens", "13", "--padding", "none", "--seed", "1"]
    command += ["--prompts", "missing.parquet", "--provenance", "{}", "--output", str(tmp_path / "w.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("error: 500 prompt and 13 new tokens are 513, more than the context of shapes, 512 tokens.")
    command[command.index("13")] = "12"
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert len(batch.load(tmp_path / "w.parquet").rows) == 2


def test_a_model_with_a_tokenizer_needs_prompts(tmp_path, tokenizer_folder):
    model = manifest(tmp_path / "m.json", "model", tokenizer_folder, tokenizer=str(tokenizer_folder), context=512)
    with pytest.raises(UserError, match="A workload for m needs prompts"):
        workload.run(model, None, None, Request(1, 8, 8, "none", 0), tmp_path / "w.parquet", {})
