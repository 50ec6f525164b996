"""Write the config's JSON schema, which editors complete and check YAML files with."""

import sys
from pathlib import Path

from kvbench import config, errors, files


def main() -> None:
    files.write_json(Path(sys.argv[1]), config.schema())


if __name__ == "__main__":
    errors.cli(main)
