"""Render the report of a run as one self-contained HTML file."""

import argparse
import json

from kvbench import errors, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stats", required=True, help="stats.parquet")
    parser.add_argument("--measurements", required=True, help="measurements.parquet")
    parser.add_argument("--quality", required=True, help="quality.parquet")
    parser.add_argument("--outputs", nargs="*", default=[], help="outputs of each variant, Parquet")
    parser.add_argument("--prompts-counts", help="counts beside prompts.parquet, JSON")
    parser.add_argument("--model-manifests", nargs="+", required=True, help="manifest of each model")
    parser.add_argument("--dataset-manifest", help="manifest of the dataset")
    parser.add_argument("--plots", nargs="*", default=[], help="figures, SVG, known by their names")
    parser.add_argument("--plan", required=True, help="plan.json, which holds the resolved config")
    parser.add_argument("--provenance", required=True, type=json.loads, help="a JSON object")
    parser.add_argument("--output", required=True, help="report.html to write")
    options = vars(parser.parse_args())
    output = options.pop("output")
    report.write(report.Inputs(**options), output)


if __name__ == "__main__":
    errors.cli(main)
