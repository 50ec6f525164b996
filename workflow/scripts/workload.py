"""Make the batch of token ids of a model's workload."""

import argparse
import json
import sys
from pathlib import Path

from kvbench import errors, isolate, workload


def main() -> None:
    """Read the arguments and write the workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-manifest", type=Path, required=True, help="manifest of the model")
    parser.add_argument("--prompts", type=Path, help="Parquet file of the prompts; not needed for random weights")
    parser.add_argument("--dataset-manifest", type=Path, help="manifest of their dataset, for whole conversations")
    parser.add_argument("--batch-size", type=int, required=True, help="rows")
    parser.add_argument("--prompt-tokens", type=int, required=True, help="tokens of a row, at most if padded")
    parser.add_argument("--new-tokens", type=int, required=True, help="tokens to generate after them")
    parser.add_argument("--padding", choices=("none", "article"), required=True)
    parser.add_argument("--seed", type=int, required=True, help="seed of random ids")
    parser.add_argument("--provenance", type=json.loads, required=True, help="JSON to store in the Parquet metadata")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file of the workload")
    options = parser.parse_args()
    request = workload.Request(
        options.batch_size, options.prompt_tokens, options.new_tokens, options.padding, options.seed
    )
    inputs = (options.model_manifest, options.prompts, options.dataset_manifest)
    # within a run the tokenizers' library is imported already, in the process that its jobs are forked from
    isolate.isolated(
        lambda: errors.cli(lambda: workload.run(*inputs, request, options.output, options.provenance)), died
    )


def died(reason: str) -> None:
    """End as the child did: a batch has no row for a failure."""
    sys.exit(f"{reason} while the batch was made")


if __name__ == "__main__":
    errors.cli(main)
