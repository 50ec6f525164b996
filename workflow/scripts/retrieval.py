"""Write what one variant retrieves from texts whose cache it has compressed."""

import argparse
import json

from kvbench import errors, jobs, retrieval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--request", required=True, type=json.loads, help="quality.retrieval of the config, as JSON")
    jobs.add_arguments(parser)
    args = parser.parse_args()
    retrieval.retrieval(jobs.from_arguments(args), args.request)


if __name__ == "__main__":
    errors.cli(main)
