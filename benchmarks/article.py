"""The article's experiment through the pipeline, against a plain script of its steps: same GPU, same weights on disk.

Random weights of Qwen3-8B's shapes are saved once, with a tokenizer trained on the book that comes with kvbench and
prompts cut from it. The plain script loads, measures and answers as the article does, six loads in one process. The
pipeline does the same under ``protocol: article`` and makes its tables, figures and report besides.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow" / "scripts"))

from kvbench import book

ROOT = Path(__file__).parents[1]
TEXTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="Qwen/Qwen3-8B", help="an architecture that `random` knows")
    parser.add_argument("--rows", type=int, default=64, help="batch size")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--plain", type=Path, help="only run the plain script on what was prepared in this folder")
    options = parser.parse_args()
    if options.plain:
        plain(options.plain, options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options.shapes, folder)
        script_s = timed([sys.executable, *sys.argv, "--plain", str(folder)])
        (folder / "config.yaml").write_text(json.dumps(config(folder, options)))
        pipeline = ["--cores", "all", "--resources", "gpu=1", "--configfile", str(folder / "config.yaml")]
        pipeline_s = timed([sys.executable, "-m", "snakemake", *pipeline])
        print(f"{'job':44} {'wall':>7} {'import':>7} {'load':>7} {'measure':>8} {'rest':>7}   seconds")
        from overhead import rows

        print("\n".join(sorted(rows(folder / "results"))))
        print(f"plain script {script_s:.1f} s, pipeline {pipeline_s:.1f} s: {pipeline_s / script_s:.2f} of it")


def prepare(shapes: str, folder: Path) -> None:
    """A checkpoint with random weights, its tokenizer, and prompts in ShareGPT's form."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from kvbench import sources
    from kvbench.loading import load_model

    chapters = [chapter.text for chapter in book.chapters()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bpe.train_from_iterator(chapters, trainers.BpeTrainer(vocab_size=8000, special_tokens=["<eos>"]))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder / "model")
    manifest = sources.fetch_model("shapes", {"random": shapes, "seed": 0}, folder / "shapes" / "manifest.json")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    load_model(manifest, "auto", "sdpa", device).model.save_pretrained(folder / "model")
    texts = [text[: 500 + 97 * (i % 60)] for i, text in enumerate(chapters * 4)]
    chats = [
        {"id": f"{i}", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A whale of it."}]}
        for i, text in enumerate(texts)
    ]
    (folder / "chats.json").write_text(json.dumps(chats))


def config(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The article's config on the prepared files; no quality metrics, which it does not have."""
    return {
        "results": str(folder / "results"),
        "dataset": {
            "name": "book",
            "source": {"path": str(folder / "chats.json")},
            "selection": "article",
        },
        "models": {"qwen3-8b": {"source": {"path": str(folder / "model")}}},
        "methods": {"baseline": "none", "knorm-0.8": {"press": "KnormPress", "args": {"compression_ratio": 0.8}}},
        "workloads": {
            "article": {
                "batch_size": options.rows,
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens,
            }
        },
        "protocol": {"name": "article", "repeats": 1},
        "outputs": {"prompts": TEXTS, "new_tokens": options.new_tokens, "max_prompt_tokens": options.prompt_tokens},
        "quality": {"windows": 0, "retrieval": {"samples": 0}},
    }


def plain(folder: Path, options: argparse.Namespace) -> None:
    """The article's steps, one after the other: prefill, generation and texts of each method, a load for each."""
    import torch
    from kvpress import KnormPress
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    checkpoint = folder / "model"
    prompts = [chat["conversations"][0]["value"] for chat in json.loads((folder / "chats.json").read_text())]
    for name, press in (("baseline", None), ("knorm-0.8", KnormPress(0.8))):
        for step in ("prefill", "generation", "texts"):
            begun = time.perf_counter()
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left" if step == "texts" else "right")
            tokenizer.pad_token = tokenizer.eos_token
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map="auto")
            chosen = prompts[:TEXTS] if step == "texts" else prompts[: options.rows]
            inputs = tokenizer(
                chosen, return_tensors="pt", padding=True, truncation=True, max_length=options.prompt_tokens
            )
            inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
            loaded = time.perf_counter()
            ending = tokenizer.eos_token_id if step == "texts" else None
            settings = model.generation_config
            settings.pad_token_id, settings.eos_token_id, settings.do_sample = tokenizer.eos_token_id, ending, False
            with torch.no_grad():
                if step == "prefill":
                    model(inputs["input_ids"][:, :10])
                with press(model) if press else nullcontext():
                    if step == "prefill":
                        model(inputs["input_ids"], past_key_values=DynamicCache(), use_cache=True)
                    else:
                        model.generate(**inputs, max_new_tokens=options.new_tokens, generation_config=settings)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            done = time.perf_counter()
            print(f"plain: {name} {step}: load {loaded - begun:.1f} s, run {done - loaded:.1f} s", flush=True)
            del model, inputs
            gc.collect()
            torch.cuda.empty_cache()


def timed(command: list[str]) -> float:
    """Seconds that a command takes; its output goes on as it comes."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
