"""Run tasks of EleutherAI's lm-evaluation-harness (RULER, LongBench, GSM8K, …) on a variant of a config."""

import argparse
import json
from pathlib import Path

from lm_eval.utils import simple_parse_args_string

from kvbench import errors, harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="config file of the workflow")
    parser.add_argument("--model", required=True, help="one of its models, fetched")
    parser.add_argument("--method", required=True, help="one of its methods")
    parser.add_argument("--tasks", required=True, nargs="+", help="tasks, groups or tags by name")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--query-aware", action="store_true", help="compress the question with the rest of the prompt")
    query.add_argument("--question-marker", help="text at whose last occurrence the question begins, not compressed")
    parser.add_argument("--include-path", type=Path, help="folder of your own task files")
    parser.add_argument("--limit", type=int, help="documents of each task, the first")
    parser.add_argument("--num-fewshot", type=int, help="examples in a prompt (default: the task's own number)")
    parser.add_argument("--apply-chat-template", action="store_true", help="put prompts into the model's chat template")
    parser.add_argument("--gen-kwargs", type=simple_parse_args_string, help="over the tasks' own: max_gen_toks=64,…")
    parser.add_argument("--metadata", type=json.loads, help='for the tasks, as JSON: {"max_seq_lengths": [4096]}')
    parser.add_argument("--output", required=True, type=Path, help="JSON file of the results")
    args = parser.parse_args()
    variant = harness.Variant(args.config, args.model, args.method, args.question_marker)
    tasks = harness.Tasks(
        args.tasks,
        args.include_path,
        args.limit,
        args.num_fewshot,
        args.apply_chat_template,
        args.gen_kwargs,
        args.metadata,
    )
    harness.run(variant, tasks, args.output)


if __name__ == "__main__":
    errors.cli(main)
