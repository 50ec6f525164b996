"""Make the token sequences that a model is retrofitted on."""

import argparse
from pathlib import Path

from kvbench import errors, jobs, retrofit
from kvbench.options import Retrofit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, type=Retrofit.model_validate_json, help="a retrofit, JSON")
    parser.add_argument("--prompts", type=Path, help="prompts.parquet; not needed for a text file")
    parser.add_argument("--dataset-manifest", type=Path, help="manifest of their dataset, for whole conversations")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    retrofit.make_corpus(jobs.from_arguments(args), args.settings, args.prompts, args.dataset_manifest)


if __name__ == "__main__":
    errors.cli(main)
