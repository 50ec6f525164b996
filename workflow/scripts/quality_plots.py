"""Draw a figure of what compression costs in quality."""

import argparse

from kvbench import errors, quality_plots, retrieval_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", required=True, help="quality.parquet")
    parser.add_argument("--figure", required=True, choices=["kl-by-kept-fraction", "kl-by-distance", "retrieval"])
    parser.add_argument("--provenance", required=True, help="JSON kept in the figures' metadata")
    parser.add_argument("--output", required=True, help="SVG to write")
    parser.add_argument("--png", required=True, help="PNG to write")
    args = parser.parse_args()
    if args.figure == "retrieval":
        retrieval_plot.draw(args.quality, args.provenance, args.output, args.png)
    else:
        quality_plots.draw(args.quality, args.figure, args.provenance, args.output, args.png)


if __name__ == "__main__":
    errors.cli(main)
