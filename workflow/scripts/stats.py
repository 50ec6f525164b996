"""Merge every cell's files into the tables."""

import argparse
import json
from pathlib import Path

from kvbench import errors, files, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", required=True, type=Path, help="plan.json, beside prefill, generation and device")
    parser.add_argument("--provenance", required=True, type=json.loads, help="a JSON object")
    parser.add_argument("--measurements", required=True, type=Path)
    parser.add_argument("--stats", required=True, type=Path)
    parser.add_argument("--csv", required=True, type=Path)
    args = parser.parse_args()
    outputs = {"measurements": args.measurements, "stats": args.stats, "csv": args.csv}
    stats.write(files.read_json(args.plan), args.plan.parent, outputs, args.provenance)


if __name__ == "__main__":
    errors.cli(main)
