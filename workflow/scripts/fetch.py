"""Get a model or a dataset and write its manifest."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from kvbench import errors, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("model", "dataset"):
        command = kinds.add_parser(kind, help=f"fetch a {kind}")
        command.add_argument("--name", required=True)
        command.add_argument("--source", required=True, type=_mapping, help="the source as JSON")
        command.add_argument("--output", required=True, type=Path, help="the manifest to write")
        if kind == "model":
            code = "let code of the repository run"
            command.add_argument("--trust-remote-code", action="store_true", help=code)
            command.add_argument("--tokenizer-from", type=Path, help="manifest of the model that lends it")
    args = parser.parse_args()
    # a job that is cancelled cleans up after itself like one that fails
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.kind == "dataset":
        sources.fetch_dataset(args.name, args.source, args.output)
    else:
        sources.fetch_model(
            args.name,
            args.source,
            args.output,
            trust_remote_code=args.trust_remote_code,
            tokenizer_from=args.tokenizer_from,
        )


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text} is no JSON object")
    return value


if __name__ == "__main__":
    errors.cli(main)
