"""Make the windows on which a model's variants are judged."""

import argparse
from pathlib import Path

from kvbench import errors, jobs, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, help="prompts.parquet; not needed for random weights")
    parser.add_argument("--dataset-manifest", type=Path, help="manifest of their dataset, for whole conversations")
    parser.add_argument("--corpora", required=True, nargs="+", choices=("own", "conversations", "book"))
    parser.add_argument("--windows", required=True, type=int, help="windows a corpus")
    parser.add_argument("--prefix-tokens", required=True, type=int, help="tokens that are compressed")
    parser.add_argument("--continuation-tokens", required=True, type=int, help="tokens that are read after them")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    request = windows.Request(args.corpora, args.windows, args.prefix_tokens, args.continuation_tokens)
    windows.make(jobs.from_arguments(args), args.prompts, args.dataset_manifest, request)


if __name__ == "__main__":
    errors.cli(main)
