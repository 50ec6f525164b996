"""Write one variant's answers to the first prompts."""

import argparse
from pathlib import Path

from kvbench import errors, jobs, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", required=True, type=Path, help="prompts.parquet")
    parser.add_argument("--count", required=True, type=int, help="how many prompts")
    parser.add_argument("--new-tokens", required=True, type=int, help="most tokens of an answer")
    parser.add_argument("--max-prompt-tokens", required=True, type=int, help="where a prompt is cut")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    outputs.outputs(jobs.from_arguments(args), args.prompts, args.count, args.new_tokens, args.max_prompt_tokens)


if __name__ == "__main__":
    errors.cli(main)
