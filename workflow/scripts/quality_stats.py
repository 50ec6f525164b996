"""Merge every variant's quality, retrieval and outputs into one table."""

import argparse
import json
from pathlib import Path

from kvbench import errors, files, quality_stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", required=True, type=Path, help="plan.json, beside quality, retrieval and outputs")
    parser.add_argument("--provenance", required=True, type=json.loads, help="a JSON object")
    parser.add_argument("--output", required=True, type=Path, help="quality.parquet to write")
    args = parser.parse_args()
    quality_stats.write(files.read_json(args.plan), args.plan.parent, args.output, args.provenance)


if __name__ == "__main__":
    errors.cli(main)
