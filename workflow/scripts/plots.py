"""Draw the bar figure of one workload from the stats."""

import argparse

from kvbench import errors, plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stats", required=True, help="stats.parquet")
    parser.add_argument("--workload", required=True, help="name of the workload to draw")
    parser.add_argument("--provenance", required=True, help="JSON kept in the figures' metadata")
    parser.add_argument("--output", required=True, help="SVG to write")
    parser.add_argument("--png", required=True, help="PNG to write")
    args = parser.parse_args()
    plots.draw(args.stats, args.workload, args.provenance, args.output, args.png)


if __name__ == "__main__":
    errors.cli(main)
