"""Measure the prefill or the generation of one cell, or search what fits."""

import argparse
from pathlib import Path

from kvbench import cells, errors, jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["prefill", "generation", "capacity"])
    parser.add_argument("--workload", required=True, type=Path, help="token ids, a Parquet file")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    stages = {"prefill": cells.prefill, "generation": cells.generation, "capacity": cells.capacity}
    stages[args.stage](jobs.from_arguments(args), args.workload)


if __name__ == "__main__":
    errors.cli(main)
