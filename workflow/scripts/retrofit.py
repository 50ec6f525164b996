"""Train eviction heads, and the weights with them: a model's DMS adapter and its training curve."""

import argparse
from pathlib import Path

from kvbench import errors, jobs, retrofit
from kvbench.options import Retrofit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, type=Retrofit.model_validate_json, help="a retrofit, JSON")
    parser.add_argument("--corpus", required=True, type=Path, help="its sequences")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    retrofit.train(jobs.from_arguments(args), args.corpus, args.settings)


if __name__ == "__main__":
    errors.cli(main)
