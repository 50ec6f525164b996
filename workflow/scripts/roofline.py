"""Draw every measured cell under the measured roofs of its device."""

import argparse

from kvbench import errors, roofline_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stats", required=True, help="stats.parquet")
    parser.add_argument("--provenance", required=True, help="JSON kept in the figures' metadata")
    parser.add_argument("--output", required=True, help="SVG to write")
    parser.add_argument("--png", required=True, help="PNG to write")
    args = parser.parse_args()
    roofline_plot.draw(args.stats, args.provenance, args.output, args.png)


if __name__ == "__main__":
    errors.cli(main)
