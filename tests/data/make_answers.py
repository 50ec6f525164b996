"""Make answers.json: what SmolLM2-135M answers to the prompts below with the cache whole, pruned, and pruned to ruin.

    PYTHONPATH=workflow/scripts python tests/data/make_answers.py results/models/smollm2-135m/manifest.json

The labels were given by reading each text, whatever method it came from, and are kept from the file that is there:

healthy    an answer in a language, right or wrong, that gets on
collapsed  it goes round in a circle to its end, stutters, or is no language
unclear    it repeats itself and gets on, or is fluent about something else
"""

import json
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kvbench import answers, methods
from kvbench.loading import load_model
from kvbench.manifest import load_manifest

FILE = Path(__file__).parent / "answers.json"
LIMITS = answers.Limits(count=20, new_tokens=96, max_prompt_tokens=1024)
METHODS = {
    "baseline": {},
    "expected-attention-0.5": {"press": "ExpectedAttentionPress", "args": {"compression_ratio": 0.5}},
    "streaming-llm-0.5": {"press": "StreamingLLMPress", "args": {"compression_ratio": 0.5}},
    "knorm-0.5": {"press": "KnormPress", "args": {"compression_ratio": 0.5}},
    "knorm-0.9": {"press": "KnormPress", "args": {"compression_ratio": 0.9}},
    "random-0.9": {"press": "RandomPress", "args": {"compression_ratio": 0.9, "seed": 0}},
    "keydiff-0.95": {"press": "KeyDiffPress", "args": {"compression_ratio": 0.95}},
}
MILL = (
    "The mill at Arden stood on the river for two hundred years. It ground the wheat of nine villages, and every"
    " autumn the carts waited along the road as far as the bridge. In 1871 the railway came, and flour from the coast"
    " was cheaper than flour from the mill. The last miller, Edda Brandt, sold the stones to a museum and turned the"
    " house into a school. The wheel still turns on feast days, though it moves nothing but water. Visitors often ask"
    " whether the school is haunted; the teachers say that only the accounts are."
)
LOG = "\n".join(
    f"2024-03-{day:02} 0{day % 9}:1{day % 6} host{day % 3} {'ERROR disk full' if day % 5 == 0 else 'INFO backup done'}"
    for day in range(1, 21)
)
PROMPTS = [
    "What is the capital of France, and why did the city grow where it is?",
    "Explain photosynthesis to a ten-year-old in one paragraph.",
    "Write a short poem about a lighthouse in winter.",
    "Give me three tips for writing a good cover letter.",
    f"{MILL}\n\nWho was the last miller, and what became of the house?",
    f"Summarise the following text in two sentences.\n\n{MILL}",
    f"Here is a log:\n{LOG}\n\nOn which days did the disk run full?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "What are the main differences between a list and a tuple in Python?",
    "List the planets of the solar system in order, with one fact about each.",
    "How do I make pancakes? Give the ingredients first and the steps after them.",
    "Translate into French: The weather is lovely today and we are going to the beach.",
    "Translate into Russian: I would like a cup of tea, please.",
    "Напиши короткий рассказ о коте, который жил у моря.",
    "请用一段话介绍长城的历史。",
    "اكتب جملة عن البحر في الشتاء.",
    "Write an email to my landlord about a broken heater. Be polite but firm.",
    "Compute 17 * 23 and show the steps.",
    "Why is the sky blue? Answer in exactly two sentences.",
    f"Continue this story:\n\n{MILL}\n\nOne night in November the wheel began to turn by itself, and",
]


def main() -> None:
    torch.set_num_threads(1)
    manifest = load_manifest(Path(sys.argv[1]))
    model = load_model(manifest, "float32", "sdpa", torch.device("cpu")).model
    known = json.loads(FILE.read_text("utf-8"))["answers"] if FILE.exists() else []
    labels = {(a["method"], a["rank"], a["text"]): a["label"] for a in known}
    table = {"rank": list(range(len(PROMPTS))), "conversation_id": [f"{i}" for i in range(20)], "prompt": PROMPTS}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.parquet")
        pq.write_table(pa.table(table), prompts)
        made = [
            {"method": name, "rank": row["rank"], "text": row["text"], "token_ids": row["token_ids"]}
            for name, spec in METHODS.items()
            for row in answers.alone(model, manifest, methods.build(spec), prompts, LIMITS)
        ]
    for answer in made:
        answer["label"] = labels.get((answer["method"], answer["rank"], answer["text"]))
    lines = ",\n".join(json.dumps(answer, ensure_ascii=False, separators=(",", ":")) for answer in made)
    prompts_text = json.dumps(PROMPTS, ensure_ascii=False, indent=0)
    FILE.write_text(f'{{"prompts": {prompts_text},\n"answers": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
