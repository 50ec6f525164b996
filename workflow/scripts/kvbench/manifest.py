"""The manifest of a fetched model or dataset: what exactly it is, and where its files lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvbench import files
from kvbench.errors import UserError

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Manifest:
    """What was fetched; ``path`` and ``tokenizer`` are absolute folders.

    ``path`` holds ``files``, each ``{"path", "bytes", "sha256"}``; a dataset is one file. ``context`` is in
    tokens, ``tokenizer`` is None for random weights, ``fetched`` is ISO-8601 in UTC.
    """

    kind: Kind
    name: str
    source: dict[str, Any]
    revision: str | None
    path: Path
    files: list[dict[str, Any]]
    licence: str | None
    fetched: str
    tokenizer: Path | None = None
    context: int | None = None
    architecture: str | None = None
    chat_template: bool = False
    trust_remote_code: bool = False
    converted_from: dict[str, Any] | None = None

    @property
    def file(self) -> Path:
        """The only file of a dataset."""
        return self.path / str(self.files[0]["path"])


def load_manifest(path: Path) -> Manifest:
    """Read a manifest; paths in it become absolute.

    Raises
    ------
    UserError : it is missing, no JSON, or no manifest.
    """
    path = Path(path).absolute()
    raw = files.read_json(path)
    try:
        raw["path"] = path.parent / raw["path"]
        if raw.get("tokenizer") is not None:
            raw["tokenizer"] = path.parent / raw["tokenizer"]
        return Manifest(**raw)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is no manifest of this version ({error})", "Delete it and run again") from error


def check_manifest_files(manifest: Manifest) -> None:
    """Check that every file is still there with its size, and code unchanged; cheap, since nothing large is read.

    Raises
    ------
    UserError : a file is gone or has another size.
    """
    remedy = f"Run `snakemake --forcerun fetch_{manifest.kind}` with your other options"
    place = "the hub cache" if "hub" in manifest.source else str(manifest.path)
    for entry in manifest.files:
        path = manifest.path / entry["path"]
        if not path.exists():
            raise UserError(f"{path} is gone from {place}", remedy)
        # code runs, and a folder of it is hashed in no time
        changed = path.suffix == ".py" and files.sha256(path) != entry["sha256"]
        if changed or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path} has changed since {manifest.fetched}", remedy)
    if manifest.tokenizer is not None and not manifest.tokenizer.is_dir():
        raise UserError(f"The tokenizer of {manifest.name} is gone from {manifest.tokenizer}", remedy)
