"""Select the prompts of a fetched dataset."""

import argparse
import json
import signal
import sys
from pathlib import Path

from kvbench import errors, prompts
from kvbench.scan import Rules


def main() -> None:
    """Read the arguments and write the prompts and their counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="manifest of the dataset")
    parser.add_argument("--selection", choices=("article", "human_first"), required=True)
    parser.add_argument("--seed", type=int, required=True, help="seed of the shuffle")
    parser.add_argument("--min-chars", type=int, required=True, help="least characters of prompt and completion")
    parser.add_argument("--max-malformed-share", type=float, required=True, help="more malformed records is an error")
    parser.add_argument("--provenance", type=json.loads, required=True, help="JSON to store in the Parquet metadata")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file of the prompts")
    parser.add_argument("--counts", type=Path, required=True, help="JSON file of what each step kept")
    options = parser.parse_args()
    # a job that is cancelled cleans up after itself like one that fails
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prompts.run(
        options.manifest,
        options.output,
        options.counts,
        Rules(options.selection, options.seed, options.min_chars, options.max_malformed_share),
        options.provenance,
    )


if __name__ == "__main__":
    errors.cli(main)
