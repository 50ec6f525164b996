"""Measure what a variant's compression does to the distribution of the next token."""

import argparse
from pathlib import Path

from kvbench import errors, jobs, quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", required=True, type=Path, help="the windows to judge it on")
    parser.add_argument("--original", type=Path, help="manifest of the model that this one is a retrofit of")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    quality.quality(jobs.from_arguments(args), args.windows, args.original)


if __name__ == "__main__":
    errors.cli(main)
