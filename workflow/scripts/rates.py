"""Measure what the device does at best: its copy bandwidth and its matmul rates."""

import argparse
import json
from pathlib import Path

from kvbench import errors, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provenance", required=True, type=json.loads, help="a JSON object")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    rates.write(args.output, args.provenance)


if __name__ == "__main__":
    errors.cli(main)
