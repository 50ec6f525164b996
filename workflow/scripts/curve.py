"""Draw the training curve of a retrofit."""

import argparse

from kvbench import curve_plot, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curve", required=True, help="curve.parquet")
    parser.add_argument("--name", required=True, help="the retrofit's name")
    parser.add_argument("--provenance", required=True, help="JSON kept in the figures' metadata")
    parser.add_argument("--output", required=True, help="SVG to write")
    parser.add_argument("--png", required=True, help="PNG to write")
    args = parser.parse_args()
    curve_plot.draw(args.curve, args.name, args.provenance, args.output, args.png)


if __name__ == "__main__":
    errors.cli(main)
